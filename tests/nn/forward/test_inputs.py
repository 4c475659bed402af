"""Projections that read one input share its product; another input, or a changed one, does not."""

import sys

import pytest
import torch
from adapted import close
from changes import SEEN
from dense_forward import MODES, adapted_model, projection, vectors, weighed


@pytest.mark.parametrize("mode", MODES)
def test_an_input_changed_in_place_between_projections(mode):
    model, adapter = adapted_model("Llama")
    x = vectors()
    for role in "qkvkq":
        module, dense = projection(model, adapter, role)
        with MODES[mode]():
            found = module(x).detach().clone()
            assert close(found, dense(x), 1e-8)
            x.mul_(-1.5)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_that_take_turns(mode):
    model, adapter = adapted_model("Llama")
    one, two = vectors(seed=1), vectors(seed=2)
    with MODES[mode]():
        for role, x in zip("qkvqkvkk", (one, two, one, two, two, two, one, two)):
            module, dense = projection(model, adapter, role)
            assert close(module(x).detach(), dense(x).detach(), 1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_projections_of_one_input_that_read_through_other_factors(mode):
    """Of other layers, or after a step."""
    model, adapter = adapted_model("Llama", "lora")
    x = vectors()
    with MODES[mode]():
        for layer in (0, 1):
            for role in "qk":
                module, dense = projection(model, adapter, role, layer)
                assert close(module(x).detach(), dense(x).detach(), 1e-8)
                SEEN["in place"](model, adapter)


def test_an_input_that_wants_gradients_from_now_on():
    model, adapter = adapted_model("Llama")
    x = vectors()
    adapter.scope.begin(model, sys._getframe())  # as where the model's own forward runs
    projection(model, adapter, "q")[0](x)
    x.requires_grad_()
    module, dense = projection(model, adapter, "k")
    (found,) = torch.autograd.grad(weighed(module(x)), x)
    assert close(found, torch.autograd.grad(weighed(dense(x)), x)[0], 1e-8)
