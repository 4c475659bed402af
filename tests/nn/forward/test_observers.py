"""Hooks of others: on factors, on modules before and behind the adapter, and outputs that are not its own."""

import pytest
import torch
from adapted import close, put
from dense_forward import (
    MODELS,
    MODES,
    adapted_model,
    all_close,
    gradients,
    loss_of,
    projection,
    same_as_dense,
    take_gradients,
    vectors,
)
from models import Attention, words
from torch import nn
from torch.nn.functional import linear
from torch.nn.modules.module import register_module_forward_hook


@pytest.mark.parametrize("before", [True, False], ids=["before a forward", "after one"])
@pytest.mark.parametrize("options", [{}, {"targets": "all", "share_residual": True}], ids=str)
def test_hooks_of_a_factor_see_its_whole_gradient_once(options, before):
    model, adapter = adapted_model("Llama", **options)
    factors = list(adapter.parameters())
    if not before:
        loss_of(model, 1)
    seen, done = [], []
    for k, factor in enumerate(factors):
        factor.register_hook(lambda gradient, k=k: seen.append((k, gradient)))
        factor.register_post_accumulate_grad_hook(lambda p, k=k: done.append((k, p.grad.clone())))
    for _ in range(2):
        adapter.zero_grad()
        loss_of(model, 1).backward()
        for calls in (seen, done):
            assert sorted(k for k, _ in calls) == list(range(len(factors)))
            assert all(close(gradient, factors[k].grad, 1e-12) for k, gradient in calls)
            calls.clear()


def test_a_hook_that_changes_the_gradient_is_obeyed():
    model, adapter = adapted_model("Llama")
    loss_of(model, 1).backward()
    plain = take_gradients(adapter)
    for factor in adapter.parameters():
        factor.register_hook(lambda gradient: 3 * gradient)
    loss_of(model, 1).backward()
    assert all_close(take_gradients(adapter), [3 * g for g in plain])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("places", [["before"], ["behind"], ["before", "behind"]], ids=" and ".join)
@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_an_observer_before_the_adapter_sees_the_base_and_one_behind_it_the_sum(name, places, mode):
    model, seen = MODELS[name]().double(), {}
    target = next(m for p, m in model.named_modules() if p.endswith(("q_proj", "self.query")))
    if "before" in places:
        target.register_forward_hook(lambda m, a, y: seen.update(before=y))
    module, dense = projection(model, put(model, dtype=torch.float64))
    assert module is target
    if "behind" in places:
        target.register_forward_hook(lambda m, a, y: seen.update(behind=y))
    x = vectors()
    expected = {"before": linear(x, module.weight, module.bias), "behind": dense(x)}
    with MODES[mode]():
        y = module(x)
    assert close(y, expected["behind"], 1e-8)
    assert not close(y, expected["before"], 1e-3)
    assert sorted(seen) == places
    assert all(close(seen[place], expected[place], 1e-8) for place in places)


@pytest.mark.parametrize("mode", MODES)
def test_a_hook_on_all_modules_sees_the_output_of_the_base(mode):
    model, adapter = adapted_model("Llama")
    module, dense = projection(model, adapter)
    seen = []
    handle = register_module_forward_hook(lambda m, a, y: seen.append(y))
    try:
        with MODES[mode]():
            y = module(vectors())
    finally:
        handle.remove()
    assert close(seen[0].detach(), linear(vectors(), module.weight), 1e-12)
    assert close(y.detach(), dense(vectors()).detach(), 1e-8)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", ["Llama", "Bert", "GPT2"])
def test_full_backward_hooks_leave_the_gradients_as_they_are(name):
    model, adapter = adapted_model(name)
    calls = []
    for site in adapter.sites:
        module = model.get_submodule(site.path)
        module.register_full_backward_hook(lambda m, gi, go: calls.append(m))
        module.register_full_backward_pre_hook(lambda m, go: calls.append(m))
    assert same_as_dense(model, words())
    assert len({*calls}) == len({site.path for site in adapter.sites})


class Passing(nn.Linear):
    """Returns its very input."""

    def forward(self, x):
        return x


class Remembering(nn.Linear):
    """Returns one buffer for ever."""

    def forward(self, x):
        if not hasattr(self, "memory"):
            self.memory = torch.ones(2, 5, 16, dtype=torch.float64)
        return self.memory


class Block(nn.Module):
    """A model of one layer of attention, whose projections are of this class."""

    def __init__(self, linear):
        super().__init__()
        self.layers = nn.ModuleList([Attention(linear=linear)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["passing", "remembering", "patched", "patched with its input"])
def test_what_a_projection_returns_but_does_not_own_is_not_written_to(kind, mode):
    classes = {"passing": Passing, "remembering": Remembering}
    model = Block(classes.get(kind, nn.Linear)).double()
    module = model.layers[0].q_proj
    x, memory = vectors(), torch.ones(2, 5, 16, dtype=torch.float64)
    if kind.startswith("patched"):
        module.forward = lambda given: given if "input" in kind else memory
    adapter = put(model, dtype=torch.float64)
    site = next(site for site in adapter.sites if site.role == "q")
    kept = x.clone()
    for _ in range(3):
        with MODES[mode]():
            y = module(x)
        share = linear(x, adapter.delta(site))
        base = x if kind in ("passing", "patched with its input") else torch.ones_like(x)
        assert close(y.detach(), (base + share).detach(), 1e-8)
        assert torch.equal(x, kept)
        if mode == "grad":
            assert all_close(gradients(y, adapter), gradients(share, adapter))
    assert torch.equal(memory, torch.ones_like(memory))
    assert torch.equal(getattr(module, "memory", memory), torch.ones_like(memory))
