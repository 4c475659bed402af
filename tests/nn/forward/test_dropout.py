"""Dropout of the adapter's input: one mask for the projections that share it, in training only."""

import sys

import pytest
import torch
from adapted import close, output, put, same_bits
from dense_forward import (
    LAYERS,
    MODELS,
    MODES,
    adapted_model,
    inputs_of,
    projection,
    same_as_dense,
    vectors,
)
from strategies import generator
from torch import nn
from torch.nn.functional import dropout, linear


def test_the_projections_of_a_layer_share_one_mask():
    model, adapter = adapted_model("Llama", dropout=0.5)
    adapter.train()
    masks = []
    for _ in range(2):
        x = vectors(4, 9)
        torch.manual_seed(len(masks))
        dropped = dropout(x, 0.5)
        torch.manual_seed(len(masks))
        adapter.scope.begin(model, sys._getframe())  # as where the model's own forward runs
        for role in "qkv":
            module, _ = projection(model, adapter, role)
            site = next(s for s in adapter.sites if s.path == LAYERS.format(0, role))
            expected = linear(x, module.weight) + linear(dropped, adapter.delta(site))
            assert close(module(x), expected, 1e-8)
        adapter.scope.end(model)
        masks.append(dropped == 0)
    assert not torch.equal(*masks)


@pytest.mark.parametrize("mode", MODES)
def test_the_next_pass_over_the_same_input_has_another_mask(mode):
    model, adapter = adapted_model("Llama", dropout=0.5)
    adapter.train()
    x, passes = vectors(), []
    with MODES[mode]():
        for _ in range(2):
            passes.append([projection(model, adapter, role)[0](x) for role in "qkv"])
    for one, other in zip(*passes):
        assert not close(one, other, 1e-3)


def test_the_mean_over_masks_is_the_share_without_dropout():
    model, adapter = adapted_model("Llama", dropout=0.5)
    x = vectors(1).expand(20_000, 16)
    with torch.no_grad():
        torch.manual_seed(0)
        for role in "qkvo":
            module, dense = projection(model, adapter.train(), role)
            base, expected = linear(x[:1], module.weight), dense(x[:1])
            noisy = module(x)
            assert close(noisy.mean(0, keepdim=True), expected, 0.02)
            assert not close(noisy[:1], expected, 0.02)
            assert not close(base, expected, 0.1)
            adapter.eval()
            assert close(module(x.clone()), dense(x), 1e-8)


@pytest.mark.parametrize("first", [True, False], ids=["train first", "eval first"])
def test_train_and_eval_between_projections_of_one_input(first):
    model, adapter = adapted_model("Llama", dropout=0.5)
    x = vectors()
    adapter.scope.begin(model, sys._getframe())  # as where the model's own forward runs
    with torch.no_grad():
        projection(model, adapter.train(first), "q")[0](x)
        module, dense = projection(model, adapter.train(not first), "k")
        assert close(module(x), dense(x), 1e-8) == first


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_training_drops_and_one_in_evaluation_does_not(name):
    model, adapter = adapted_model(name, dropout=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert same_as_dense(model, inputs_of(name))
    adapter.train()
    one, two = output(model, inputs_of(name)), output(model, inputs_of(name))
    assert not close(one, two, 1e-3)
    adapter.eval()
    assert same_as_dense(model, inputs_of(name))


def test_dropout_is_for_training_only(llama, inputs):
    plain = put(llama, name="plain")
    expected = output(llama, inputs)
    plain.remove()
    adapter = put(llama, dropout=0.5)
    assert not adapter.training
    assert same_bits(output(llama, inputs), expected)
    llama.train()
    assert adapter.training
    one, two = output(llama, inputs), output(llama, inputs)
    assert not same_bits(one, two)
    torch.manual_seed(0)
    one = output(llama, inputs)
    torch.manual_seed(0)
    assert same_bits(output(llama, inputs), one)
    llama.eval()
    assert same_bits(output(llama, inputs), expected)


def test_an_adapter_put_on_a_training_model_trains(llama):
    llama.train()
    assert put(llama, dropout=0.5).training


@pytest.mark.parametrize("role", list("qo"))
def test_dropout_drops_input_features_and_keeps_the_mean(llama, role):
    """The share is that of the input after dropout: with one seed it is known."""
    adapter = put(llama, dropout=0.25, targets=role, layers=0).train()
    (site,) = adapter.sites
    projection = llama.get_submodule(site.path)
    x = torch.randn(2, 3, 16, generator=generator())
    torch.manual_seed(1)
    found = projection(x)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, 0.25)
    expected = linear(x, projection.weight) + linear(dropped, adapter.delta(site))
    assert (dropped == 0).any()
    assert close(found, expected)
    adapter.disable()
    assert same_bits(projection(x), linear(x, projection.weight))


def test_zero_dropout_draws_no_random_numbers(llama, inputs):
    put(llama, init="invariant")
    llama.train()
    state = torch.get_rng_state()
    output(llama, inputs)
    assert torch.equal(torch.get_rng_state(), state)
