"""Forwards and backwards in any order, and steps between them."""

import pytest
import torch
from adapted import close, put, same_bits
from changes import SEEN
from dense_forward import (
    adapted_model,
    all_close,
    dense_gradients,
    densely,
    each_simple_model,
    gradients,
    loss_of,
    projection,
    same_as_dense,
    take_gradients,
    vectors,
    weighed,
)
from models import each_family, words
from strategies import generator

import lortalib
from lortalib.nn import set_active


def loss_on(model, inputs):
    return model(**inputs)[0].float().square().mean()


@each_simple_model
def test_two_forwards_before_their_backwards(name):
    model, adapter = adapted_model(name)
    expected = dense_gradients(model, 1, 2)
    one, two = loss_of(model, 1), loss_of(model, 2)
    two.backward()
    one.backward()
    assert all_close(take_gradients(adapter), expected)
    one, two = loss_of(model, 1), loss_of(model, 2)
    (one + two).backward()
    assert all_close(take_gradients(adapter), expected)


@each_simple_model
def test_a_backward_twice_adds_up(name):
    model, adapter = adapted_model(name)
    expected = dense_gradients(model, 1)
    loss = loss_of(model, 1)
    for times in (1, 2, 3):
        loss.backward(retain_graph=times < 3)
        assert all_close([p.grad for p in adapter.parameters()], [times * g for g in expected])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    take_gradients(adapter)
    loss_of(model, 1).backward()
    assert all_close(take_gradients(adapter), expected)


def test_forwards_and_backwards_that_overlap():
    model, adapter = adapted_model("Llama")
    expected = dense_gradients(model, 1, 2, 3)
    one, two = loss_of(model, 1), loss_of(model, 2)
    one.backward()
    three = loss_of(model, 3)
    two.backward()
    three.backward()
    assert all_close(take_gradients(adapter), expected)


def test_second_derivatives_are_those_of_dense_updates():
    model, adapter = adapted_model("Llama", "tucker")
    model.set_attn_implementation("eager")
    factors, found = list(adapter.parameters()), []
    for value in (model(**words())[0], densely(model, words())):
        first = torch.autograd.grad(weighed(value), factors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), factors))
    assert all_close(*found)


@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_projections_of_one_input_with_a_backward_between(name):
    model, adapter = adapted_model(name)
    x = vectors()
    for order in ("qkv", "vqk", "qqk", "kkkk"):
        for role in order:
            module, dense = projection(model, adapter, role)
            weighed(module(x)).backward()
            assert all_close(take_gradients(adapter), gradients(dense(x), adapter))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_the_input_alone_between_projections(frozen):
    model, adapter = adapted_model("Llama")
    adapter.requires_grad_(not frozen)
    x = vectors().requires_grad_()
    for role in "qk":
        module, dense = projection(model, adapter, role)
        (found,) = torch.autograd.grad(weighed(module(x)), x)
        assert close(found, torch.autograd.grad(weighed(dense(x)), x)[0], 1e-8)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@pytest.mark.parametrize("change", ["SGD foreach", "Adam", "in place", "load_state_dict"])
def test_a_step_between_forward_and_backward_is_an_error(name, change):
    model, adapter = adapted_model(name)
    (network,) = adapter.networks
    loss_of(model, 1).backward()
    loss = loss_of(model, 1)
    SEEN[change](model, adapter)
    with pytest.raises(RuntimeError, match=f"network '{network}' was changed in place between"):
        loss.backward()
    assert same_as_dense(model, words())


@each_family
def test_after_one_step_every_factor_has_a_gradient_and_no_base_weight(family):
    model, inputs = family.model(), family.inputs()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = put(model, init="invariant")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss_on(model, inputs).backward()
        for name, parameter in model.named_parameters():
            if name.startswith("lortalib."):
                assert parameter.grad is not None
                assert torch.isfinite(parameter.grad).all()
                assert step == 0 or parameter.grad.abs().max() > 0, name
            else:
                assert parameter.grad is None, name
        optimizer.step()
    now = dict(model.named_parameters())
    assert all(same_bits(now[name], old) for name, old in base.items())


def test_an_inactive_adapter_gets_no_gradient(llama, inputs):
    first, second = put(llama, name="a"), put(llama, name="b", seed=1)
    set_active(llama, "b")
    loss_on(llama, inputs).backward()
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None for p in second.parameters())


def test_training_lowers_the_loss(llama, inputs):
    adapter = lortalib.nn.apply(llama, "cp", rank=4, generator=generator())
    optimizer = torch.optim.Adam(adapter.parameters(), lr=2e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = llama(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
