"""What an adapter leaves alone: fresh, disabled, removed, copied; and several on one model."""

import copy
import pickle
from itertools import combinations

import pytest
import torch
from adapted import changes, close, output, picture, put, same_bits, unchanged
from models import FAMILIES, each_family
from torch.utils.hooks import RemovableHandle

import lortalib
from lortalib.nn import adapters, load, set_active, sites


@each_family
def test_every_family_runs_and_is_left_as_it_was(family):
    model, inputs = family.model(), family.inputs()
    before, look = output(model, inputs), picture(model)
    adapter = put(model)
    assert len(adapter.sites) == 4 * sum(stack.layers for stack in family.stacks.values())
    assert not close(output(model, inputs), before, 1e-3)
    with adapter.disabled():
        assert same_bits(output(model, inputs), before)
    adapter.remove()
    assert changes(look, picture(model)) == []
    assert same_bits(output(model, inputs), before)


@each_family
def test_each_site_has_its_share_in_the_forward(family):
    """With one site's update written into its weight by hand, the output is that of the hook."""
    model, inputs = family.model(), family.inputs()
    for site in sites(model):
        adapter = put(model, targets=[site.path])
        assert adapter.sites == [site]
        expected, update = output(model, inputs), adapter.delta(site).detach()
        adapter.remove()
        weight = model.get_submodule(site.path).weight
        with torch.no_grad():
            old = weight.clone()
            weight += update
            found = output(model, inputs)
            weight.copy_(old)
        assert close(found, expected)


def test_module_classes_names_and_keys_stay_while_it_is_on(llama):
    classes = [(path, type(module)) for path, module in llama.named_modules()]
    keys, names = list(llama.state_dict()), [name for name, _ in llama.named_parameters()]
    put(llama)
    assert _modules(llama) == classes
    assert [key for key in llama.state_dict() if not key.startswith("lortalib.")] == keys
    own = [name for name, _ in llama.named_parameters() if not name.startswith("lortalib.")]
    assert own == names


def _modules(model):
    named = ((path, type(module)) for path, module in model.named_modules())
    return [pair for pair in named if pair[0].partition(".")[0] != "lortalib"]


@pytest.mark.parametrize("freeze", [True, False])
def test_flags_while_it_is_on_and_after(llama, freeze):
    llama.model.embed_tokens.weight.requires_grad_(False)
    look = picture(llama)
    flags = {name: p.requires_grad for name, p in llama.named_parameters()}
    adapter = put(llama, freeze=freeze)
    assert all(p.requires_grad for p in adapter.parameters())
    for name, flag in flags.items():
        assert llama.get_parameter(name).requires_grad == (flag and not freeze)
    adapter.remove()
    assert changes(look, picture(llama)) == []


def test_what_the_second_froze_thaws_when_it_leaves(llama):
    put(llama, name="a", freeze=False)
    second = put(llama, name="b")
    assert not llama.model.norm.weight.requires_grad
    second.remove()
    assert llama.model.norm.weight.requires_grad


# Several


def test_active_adapters_add_up(llama, inputs):
    before = output(llama, inputs)
    three = [put(llama, name=name, seed=k, alpha=0.5) for k, name in enumerate("abc")]
    assert list(adapters(llama)) == ["a", "b", "c"]
    for number in range(4):
        for chosen in combinations(three, number):
            set_active(llama, [adapter.name for adapter in chosen])
            assert [adapter.active for adapter in three] == [a in chosen for a in three]
            found = output(llama, inputs)
            set_active(llama, [])
            assert same_bits(output(llama, inputs), before)
            assert close(found, _by_hand(llama, inputs, chosen))


def _by_hand(model, inputs, chosen):
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for adapter in chosen:
            for site in adapter.sites:
                copied.get_submodule(site.path).weight += adapter.delta(site)
    return output(copied, inputs)


def test_activate_takes_one_name_and_unmerges_the_others(llama, inputs):
    put(llama, name="a")
    alone = output(llama, inputs)
    put(llama, name="b", seed=1).merge()
    set_active(llama, "a")
    assert same_bits(output(llama, inputs), alone)
    set_active(llama, ["b", "a", "b"])
    assert all(adapter.active for adapter in adapters(llama).values())


def test_activate_of_an_unknown_name_changes_nothing(llama):
    put(llama, name="a")
    with unchanged(llama), pytest.raises(KeyError, match="called 'x', 'y'; the model has 'a'"):
        set_active(llama, ["x", "a", "y"])


def test_switching_does_not_touch_the_weights(llama):
    put(llama, name="a")
    put(llama, name="b", seed=1)
    versions = [p._version for p in llama.parameters()]
    hooks = [list(module._forward_hooks) for module in llama.modules()]
    for names in ("a", "b", [], ["a", "b"]):
        set_active(llama, names)
    assert [p._version for p in llama.parameters()] == versions
    assert [list(module._forward_hooks) for module in llama.modules()] == hooks


@pytest.mark.parametrize("first", [0, 1])
def test_the_last_to_leave_restores_the_model(llama, first):
    look = picture(llama)
    both = [put(llama, name="a"), put(llama, name="b", seed=1, targets="o", layers=1)]
    both[first].remove()
    assert list(adapters(llama)) == ["ba"[first]]
    assert both[1 - first].active
    both[1 - first].remove()
    assert changes(look, picture(llama)) == []
    assert adapters(llama) == {}
    put(llama, name="a")


def test_a_removed_adapter_says_so(llama):
    adapter = put(llama)
    site = adapter.sites[0]
    adapter.remove()
    for act in (adapter.enable, adapter.merge, adapter.remove, lambda: adapter.save("x")):
        with pytest.raises(RuntimeError, match="'default' was removed from its model"):
            act()
    assert adapter.delta(site).shape == site.weight_shape
    assert adapter.count() > 0
    assert "on no model" in repr(adapter)


# Copies


def test_a_copy_of_a_merged_model_can_be_unmerged(llama, inputs):
    base = output(llama, inputs)
    put(llama).merge()
    twin = copy.deepcopy(llama)
    adapters(twin)["default"].disable()
    assert same_bits(output(twin, inputs), base)
    assert not close(output(llama, inputs), base, 1e-3)


def test_a_pickled_model_takes_another_adapter_in_a_fresh_process(llama, inputs, monkeypatch):
    """Torch counts hooks from 0 in each process: those of a pickle can meet new ones' numbers."""
    first = RemovableHandle.next_id
    put(llama, name="first")
    pickled = pickle.dumps(llama)
    put(llama, name="second", seed=1)
    expected = output(llama, inputs)
    monkeypatch.setattr(RemovableHandle, "next_id", first)
    twin = pickle.loads(pickled)
    put(twin, name="second", seed=1)
    assert close(output(twin, inputs), expected)


@pytest.mark.parametrize("options", [{}, {"train_also": ["lm_head"]}, {"merged": True}])
def test_an_adapter_that_is_pickled_alone_is_on_no_model(options, llama, inputs, tmp_path):
    options, merged = dict(options), options == {"merged": True}
    options.pop("merged", None)
    adapter = put(llama, name="a", **options)
    with torch.no_grad():
        for path in adapter.trained_modules.paths:
            llama.get_submodule(path).weight.add_(1)
    wanted = output(llama, inputs)
    if merged:
        adapter.merge()
    for _ in range(2):  # a copy of a copy is one too
        adapter = pickle.loads(pickle.dumps(adapter))
        assert not adapter.is_on_model
    assert len(pickle.dumps(adapter)) < len(pickle.dumps(llama)) / 3
    fresh = FAMILIES["Llama"].model("ForCausalLM")
    load(fresh, adapter.save(tmp_path, model=fresh))
    assert close(output(fresh, inputs), wanted)
    with pytest.raises(RuntimeError, match="is a copy on no model"):
        adapter.merge()


@pytest.mark.parametrize("first", ["model", "adapter", "part"])
def test_an_adapter_that_is_pickled_with_its_model_is_on_it(first, llama, inputs):
    base = output(llama, inputs)
    adapter = put(llama, train_also=["lm_head"])
    with torch.no_grad():
        llama.lm_head.weight.add_(1)
    wanted = output(llama, inputs)
    pair = {"model": llama, "adapter": adapter}
    parts = [llama.model.layers[0], *(pair[k] for k in sorted(pair))]
    order = {"model": parts[::-1], "adapter": parts[1:] + parts[:1], "part": parts}[first]
    copies = pickle.loads(pickle.dumps(order))
    twin = copies[order.index(llama)]
    own = copies[order.index(adapter)]
    assert adapters(twin)["default"] is own
    assert own.model is twin
    assert same_bits(output(twin, inputs), wanted)
    own.remove()
    assert same_bits(output(twin, inputs), base)


def test_a_layer_that_is_pickled_alone_computes_what_it_did(llama):
    put(llama)
    layer = llama.model.layers[0].self_attn.q_proj
    twin = pickle.loads(pickle.dumps(layer))
    x = torch.randn(2, 3, layer.in_features)
    assert same_bits(twin(x), layer(x))


# What it says of itself


def test_delta_takes_a_path_and_names_a_wrong_one(llama):
    adapter = put(llama)
    site = adapter.sites[5]
    assert same_bits(adapter.delta(site), adapter.delta(site.path))
    assert adapter.delta(site).requires_grad
    with pytest.raises(KeyError, match=r"no site 'nowhere'; the first of its 8 is 'model\.layers"):
        adapter.delta("nowhere")


def test_delta_is_scaled(llama):
    one, three = (put(llama, name=name, alpha=alpha) for name, alpha in (("a", 1), ("b", -3)))
    for site in one.sites:
        assert close(three.delta(site), -3 * one.delta(site), 1e-6)


def test_the_published_start_divides_by_the_rank(llama):
    adapter = lortalib.nn.apply(llama, "cp", rank=4, alpha=8, init="lorta")
    assert adapter.scaling == adapter.config.scaling == 2
    assert lortalib.nn.apply(llama, "cp", rank=4, alpha=8, name="b").scaling == 8


def test_count_and_words(llama):
    adapter = lortalib.nn.apply(llama, "cp", rank=3, alpha=0.5)
    assert adapter.count() == 3 * (2 + 4 + 4 + 16 + 4)
    base = sum(p.numel() for name, p in llama.named_parameters() if "lortalib" not in name)
    lora = 2 * (2 * (16 + 16) + 2 * (16 + 8))
    text = repr(adapter)
    assert text.startswith("Adapter 'default' on LlamaForCausalLM (active): cp, scaling 0.5")
    assert "in r, out r, head r, layer r, matrix r" in text
    assert f"90 trainable parameters, {9000 / base:.3g} % of the model's {base:,}" in text
    assert f"LoRA of rank 3 on these 8 projections has {3 * lora:,}" in text
    assert f"({3 * lora / 90:.3g} times as many)" in text
    assert "Adapter 'default' on LlamaForCausalLM" in str(llama)
    adapter.disable()
    assert "(not active)" in repr(adapter)
    adapter.merge()
    assert "(merged)" in repr(adapter)


def test_frozen_parameters_are_not_counted(llama):
    adapter = put(llama, "lora_xs", 2)
    assert adapter.count() == 2 * 4 * 4
    assert adapter.count(trainable_only=False) == 32 + 2 * 4 * 2 * (16 + 16)
    assert "32 trainable parameters" in repr(adapter)


def test_lora_counts_as_lora(llama):
    adapter = put(llama, "lora", 2, gqa="split")
    assert adapter.count() == 2 * 2 * (2 * (16 + 16) + 2 * (16 + 8))
    assert "(1 times as many)" in repr(adapter)
