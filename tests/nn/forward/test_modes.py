"""Forwards with gradients, without, and in inference mode, in any order."""

from itertools import permutations

import pytest
import torch
from adapted import close, put
from dense_forward import (
    MODELS,
    MODES,
    adapted_model,
    all_close,
    gradients,
    projection,
    same_as_dense,
    same_output_as_dense,
    vectors,
    weighed,
)
from models import words

orders = pytest.mark.parametrize("order", [*permutations(MODES)], ids="-".join)


@orders
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_forwards_with_and_without_gradients_in_any_order(name, order):
    model, _ = adapted_model(name)
    for kind in [*order, *order]:
        with MODES[kind]():
            if kind != "grad":
                assert same_output_as_dense(model, words())
                continue
        assert same_as_dense(model, words())


@orders
@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_projections_of_one_input_with_and_without_gradients(name, order):
    model, adapter = adapted_model(name)
    x = vectors()
    pairs = [projection(model, adapter, role) for role in "qkv"]
    for kinds in (order, order[::-1]):
        for (module, dense), kind in zip(pairs, kinds):
            with MODES[kind]():
                y = module(x)
                assert y.requires_grad == (kind == "grad")
            assert close(y.detach(), dense(x), 1e-8)
            if kind == "grad":
                assert all_close(gradients(y, adapter), gradients(dense(x), adapter))


def test_an_adapter_made_in_inference_mode_works_outside_it():
    model = MODELS["Llama"]().double()
    with torch.inference_mode():
        put(model, dtype=torch.float64)
    with torch.no_grad():
        assert same_output_as_dense(model, words())
    with torch.inference_mode():
        assert same_output_as_dense(model, words())


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_factor_gets_gradients_exactly_while_it_wants_them(name):
    model, adapter = adapted_model(name)
    factors = list(adapter.parameters())
    for flags in ([1, 1, 0, 1, 1], [0, 0, 0, 0, 1], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1]):
        for factor, flag in zip(factors, flags):
            factor.requires_grad_(bool(flag))
            factor.grad = None
        assert same_as_dense(model, words())
        weighed(model(**words())[0]).backward()
        assert [factor.grad is not None for factor in factors] == [bool(flag) for flag in flags]
    adapter.requires_grad_(False)
    assert not model(**words())[0].requires_grad


def test_a_factor_frozen_between_forward_and_backward_is_skipped():
    model, adapter = adapted_model("Llama")
    first, *others = adapter.parameters()
    loss = weighed(model(**words())[0])
    first.requires_grad_(False)
    loss.backward()
    assert first.grad is None
    assert all(factor.grad is not None for factor in others)
