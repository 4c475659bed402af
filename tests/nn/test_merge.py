"""Merging: the weights hold the updates, and give every bit back."""

import copy

import pytest
import torch
from adapted import changes, close, output, picture, put, same_bits
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import FAMILIES, each_family

from lortalib.nn import adapters, set_active, sites
from lortalib.nn._forward import UpdateHook

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(model):
    """A copy of the weight of every site."""
    return [model.get_submodule(site.path).weight.detach().clone() for site in sites(model)]


def share_hooks(model):
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return sum(isinstance(hook, UpdateHook) for hook in hooks)


@each_family
def test_merged_forward_is_the_adapted_one(family):
    model, inputs = family.model(), family.inputs()
    adapter = put(model, alpha=0.7)
    expected, before = output(model, inputs), weights(model)
    adapter.merge()
    assert adapter.merged
    assert share_hooks(model) == 0
    assert close(output(model, inputs), expected)
    for site, old in zip(adapter.sites, before):
        new = model.get_submodule(site.path).weight
        assert close(new - old, adapter.delta(site), 1e-6)
    adapter.unmerge()
    assert share_hooks(model) == len(adapter.sites)
    assert all(map(same_bits, weights(model), before))
    assert same_bits(output(model, inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["Bert", "T5", "Conv1D", "Gemma"])
def test_unmerge_gives_every_bit_back(name, dtype):
    """Also of weights that an addition and a subtraction would not restore."""
    model = FAMILIES[name].model().to(dtype)
    with torch.no_grad():
        for site in sites(model):
            weight = model.get_submodule(site.path).weight
            weight.view(-1)[:3] = torch.tensor([-0.0, 6e-8, 1e-3])
            weight.view(-1)[3:6] *= 1e3
    look = picture(model)
    adapter = put(model, alpha=3)
    before = weights(model)
    for _ in range(3):
        adapter.merge()
        assert not any(map(same_bits, weights(model), before))
        adapter.unmerge()
        assert all(map(same_bits, weights(model), before))
    adapter.remove()
    assert changes(look, picture(model)) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_weight_is_rounded_once(llama, dtype):
    llama.to(dtype)
    three = [put(llama, name=name, seed=seed) for seed, name in enumerate("abc")]
    before = weights(llama)
    for adapter in reversed(three):
        adapter.merge()
    for site, old, new in zip(sites(llama), before, weights(llama)):
        total = old.float()
        for adapter in three:
            total = total + adapter.delta(site).detach()
        assert same_bits(new, total.to(dtype))


def test_merging_twice_is_merging_once(llama):
    adapter = put(llama)
    before = weights(llama)
    adapter.unmerge()
    assert all(map(same_bits, weights(llama), before))
    adapter.merge()
    merged = weights(llama)
    adapter.merge()
    assert all(map(same_bits, weights(llama), merged))
    adapter.unmerge()
    adapter.unmerge()
    assert all(map(same_bits, weights(llama), before))
    assert share_hooks(llama) == len(adapter.sites)


def test_merging_a_disabled_adapter_turns_it_on(llama, inputs):
    adapter = put(llama)
    expected = output(llama, inputs)
    adapter.disable()
    adapter.merge()
    assert adapter.active
    assert close(output(llama, inputs), expected)


def test_disabled_takes_a_merged_adapter_out_and_back(llama, inputs):
    before = output(llama, inputs)
    adapter = put(llama)
    adapter.merge()
    merged = output(llama, inputs)
    with adapter.disabled():
        assert not adapter.merged
        assert same_bits(output(llama, inputs), before)
    assert adapter.merged
    assert same_bits(output(llama, inputs), merged)
    with pytest.raises(ZeroDivisionError), adapter.disabled():
        raise ZeroDivisionError
    assert adapter.merged
    assert share_hooks(llama) == 0


@pytest.mark.parametrize("switched", ["disabled", "set_active that fails"])
def test_what_was_merged_is_merged_again_whatever_the_factors_have_become(switched, llama, inputs):
    other = put(llama, name="other", train_also=["lm_head"])
    other.disable()
    llama.lm_head = torch.nn.Linear(llama.config.hidden_size, 70, bias=False)
    one = put(llama, name="one")
    one.merge()
    merged = output(llama, inputs)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.fill_(float("nan"))
    if switched == "disabled":
        with one.disabled():
            pass
    else:
        with pytest.raises(ValueError, match="resized"):
            set_active(llama, ["other"])
    assert (one.active, one.merged) == (True, True)
    assert same_bits(output(llama, inputs), merged)


def test_a_merge_follows_changed_factors(llama, inputs):
    adapter = put(llama)
    adapter.merge()
    with torch.no_grad():
        next(adapter.parameters()).neg_()
    adapter.unmerge()
    expected = output(llama, inputs)
    adapter.merge()
    assert close(output(llama, inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_remove_merged_leaves_the_update(llama, inputs, dtype):
    llama.to(dtype)
    names = [name for name, _ in llama.named_parameters()]
    adapter = put(llama)
    updated = [llama.get_submodule(s.path).weight.float() + adapter.delta(s) for s in adapter.sites]
    adapter.remove(merged=True)
    assert all(map(same_bits, weights(llama), [u.to(dtype) for u in updated]))
    assert [name for name, _ in llama.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in llama.parameters())
    assert share_hooks(llama) == 0
    assert not hasattr(llama, "lortalib")


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_stays_merged_is_merged_into_the_new_base(llama, dtype):
    """To the bit, whichever was applied first: as if the other had been left in the weights before."""
    llama.to(dtype)
    one, other = put(llama, name="one"), put(llama, name="other", targets="qv", seed=1)
    base = weights(llama)
    one.merge()
    other.remove(merged=True)
    now = weights(llama)
    one.unmerge()
    kept = weights(llama)
    assert not all(map(same_bits, kept, base))
    one.merge()
    assert all(map(same_bits, weights(llama), now))


def test_the_weights_move_with_the_model_while_merged(llama):
    adapter = put(llama)
    before = weights(llama)
    adapter.merge()
    llama.to(torch.bfloat16)
    adapter.unmerge()
    half = [weight.to(torch.bfloat16) for weight in before]
    assert all(map(same_bits, weights(llama), half))


class Life(RuleBasedStateMachine):
    """Up to three adapters live on a model; kept beside it is what its base should be.

    Only remove(merged=True) changes the base. At any time a weight that no adapter is merged into
    is the base's bit for bit, and the model computes the base plus the sum of all active updates.
    """

    names = st.sampled_from("abc")

    @initialize(dtype=st.sampled_from(DTYPES), family=st.sampled_from(["Llama", "Bert", "Conv1D"]))
    def start(self, dtype, family):
        self.dtype, self.inputs = dtype, FAMILIES[family].inputs()
        self.model = FAMILIES[family].model().to(dtype)
        self.plain = copy.deepcopy(self.model).float()
        self.look = picture(self.model)
        self.base = {s.path: w for s, w in zip(sites(self.model), weights(self.model))}
        self.settled = False

    def updates(self, path, state):
        """The updates of one weight by the adapters that are merged, or by those that act beside it."""
        for adapter in adapters(self.model).values():
            if adapter.merged if state == "merged" else adapter.active and not adapter.merged:
                yield from (adapter.delta(s).detach() for s in adapter.sites if s.path == path)

    @rule(name=names, roles=st.sampled_from(["qkvo", "q", "vo"]), seed=st.integers(0, 9))
    def apply(self, name, roles, seed):
        if name not in adapters(self.model):
            put(self.model, name=name, targets=roles, seed=seed, alpha=0.5)

    acts = st.sampled_from(["merge", "unmerge", "enable", "disable"])

    @rule(name=names, act=acts)
    def act(self, name, act):
        if adapter := adapters(self.model).get(name):
            getattr(adapter, act)()

    @rule(name=names, other=names, act=acts)
    def act_while_another_is_disabled(self, name, other, act):
        on = adapters(self.model)
        if name != other and {name, other} <= set(on):
            active, merged = on[name].active, on[name].merged
            with on[name].disabled():
                assert not on[name].active
                getattr(on[other], act)()
            assert (on[name].active, on[name].merged) == (active, merged)

    @precondition(lambda self: adapters(self.model))
    @rule(data=st.data())
    def set_active(self, data):
        on = adapters(self.model)
        chosen = data.draw(st.sets(st.sampled_from(list(on))))
        set_active(self.model, chosen)
        assert {name for name, adapter in on.items() if adapter.active} == chosen

    @rule(name=names, merged=st.booleans())
    def remove(self, name, merged):
        if adapter := adapters(self.model).get(name):
            for site in adapter.sites if merged else ():
                total = self.base[site.path].float() + adapter.delta(site).detach()
                self.base[site.path] = total.to(self.dtype)
            self.settled |= merged
            adapter.remove(merged=merged)

    @invariant()
    def weights_are_the_base_plus_the_merged(self):
        for path, base in self.base.items():
            found = self.model.get_submodule(path).weight.detach()
            updates = list(self.updates(path, "merged"))
            if updates:
                step = torch.finfo(self.dtype).eps
                assert close(found.float(), base.float() + sum(updates), 2 * step)
            else:
                assert same_bits(found, base)

    @invariant()
    def hooks_are_those_of_the_unmerged(self):
        expected = [len(a.sites) for a in adapters(self.model).values() if not a.merged]
        assert share_hooks(self.model) == sum(expected)

    def teardown(self):
        if not hasattr(self, "model"):
            return
        with torch.no_grad():
            for path in self.base:
                # With merged updates as they were rounded: some of these models amplify rounding much.
                total = self.model.get_submodule(path).weight.float() + sum(
                    self.updates(path, "beside")
                )
                self.plain.get_submodule(path).weight.copy_(total)
        found = output(copy.deepcopy(self.model).float(), self.inputs)
        assert close(found, output(self.plain, self.inputs), 2e-4)
        for adapter in adapters(self.model).values():
            adapter.remove()
        if not self.settled:
            assert changes(self.look, picture(self.model)) == []


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)


def test_a_model_cast_while_merged_keeps_the_base_and_merges_in_its_new_dtype():
    model = FAMILIES["Llama"].model().half()
    adapter, before = put(model), weights(model)
    adapter.merge()
    model.float()
    adapter.unmerge()
    assert all(map(same_bits, weights(model), [weight.float() for weight in before]))
    adapter.merge()
    for site, old in zip(adapter.sites, before):
        new = model.get_submodule(site.path).weight
        assert close(new - old.float(), adapter.delta(site), 1e-6)
