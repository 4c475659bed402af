"""What trained, or was about to, is freed with its graph as soon as nobody holds it."""

import gc
import weakref
from contextlib import nullcontext, suppress

import pytest
import torch
from adapted import put
from banks import prompts, random_stack, small_llama
from wrapped_models import wrapped

from lortalib import nn
from lortalib._torch import live_checkpoints


def an_adapter(model):
    put(model)
    return nullcontext()


def two_tasks(model):
    adapter = nn.apply(model, "metatt_41d", rank=2, tasks=["a", "b"], init="normal")
    return adapter.using(["a", "b"])


def a_default_task(model):
    nn.apply(model, "metatt_41d", rank=2, tasks=["a", "b"], init="normal").default = "b"
    return nullcontext()


def a_trained_bank(model):
    bank = nn.bank(model, "cp", rank=2)
    rows = random_stack(bank, 2)
    for tensors in rows.values():
        for tensor in tensors:
            tensor.requires_grad_()
    return bank.using_tensors(rows)


def a_filled_bank(model):
    bank = nn.bank(model, "cp", rank=2)
    bank.fill(["ann", "bob"], random_stack(bank, 2))
    return bank.using(["ann", "bob"])


DOORS = [an_adapter, two_tasks, a_default_task, a_trained_bank, a_filled_bank]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("backward", [True, False])
def test_a_model_is_freed_with_the_graph_of_its_forward(door, reentrant, backward):
    def train():
        model = small_llama().train()
        context = door(model)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        with context:
            loss = model(**prompts(), use_cache=False)[0].square().mean()
        if backward:
            loss.backward()
        return weakref.ref(model)

    model = train()
    gc.collect()
    assert model() is None
    assert live_checkpoints() == []


def test_parameters_that_a_change_of_rank_replaces_are_freed():
    model = small_llama()
    adapter = put(model, rank=3)
    optimizer = torch.optim.AdamW(adapter.parameters())
    model(**prompts())[0].square().mean().backward()
    optimizer.step()
    old = [weakref.ref(parameter) for parameter in adapter.parameters()]
    nn.change_rank(adapter, optimizer, 2)
    gc.collect()
    assert [reference() for reference in old] == [None] * 5


def by_hooks():
    model = small_llama()
    adapter = put(model)
    return model, adapter, adapter.remove


def by_peft():
    model = wrapped(kind="ForCausalLM")
    return model.get_base_model(), model.base_model.lorta_adapters["default"], model.unload


@pytest.mark.parametrize("door", [by_hooks, by_peft])
def test_an_adapter_that_left_a_model_does_not_keep_it(door):
    def left():
        model, adapter, leave = door()

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = model.lm_head.register_forward_hook(interrupt)
        with suppress(KeyboardInterrupt):
            model(**prompts())
        handle.remove()
        leave()
        return adapter, weakref.ref(model)

    adapter, model = left()
    gc.collect()
    assert model() is None
    assert adapter.count() > 0
