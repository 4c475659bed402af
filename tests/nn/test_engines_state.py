"""State dicts, copies, containers and other tools' wrappers around a model that has an adapter."""

import copy

import peft
import pytest
import torch
from adapted import bits, changes, close, output, picture, put, same_bits
from models import FAMILIES
from safetensors.torch import load_file, save_model
from torch import nn

import lortalib
from lortalib.peft import LortaConfig

FAMILY = FAMILIES["Llama"]
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
INPUTS = {"input_ids": IDS}
SHARED = {"targets": "all", "share_residual": True}


@pytest.fixture
def model():
    return FAMILY.model("ForCausalLM")


# One parameter in several networks


def test_a_shared_factor_is_in_a_state_dict_once(model):
    adapter = put(model, **SHARED)
    state = model.state_dict()
    own = {name: tensor for name, tensor in state.items() if name.startswith("lortalib.")}
    assert len(own) == len(list(adapter.parameters()))
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded_and_the_factor_is_shared_still(model, assign):
    put(model, **SHARED)
    other = FAMILY.model("ForCausalLM")
    adapter = put(other, seed=1, **SHARED)
    assert not close(output(other, INPUTS), output(model, INPUTS))
    count = len(list(adapter.parameters()))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other.load_state_dict(state, assign=assign)  # strict
    assert same_bits(output(other, INPUTS), output(model, INPUTS))
    assert len(list(adapter.parameters())) == count
    first = next(iter(adapter.networks.values()))
    with torch.no_grad():
        first.in_r.zero_()
    assert all(not pair.any() for pair in (adapter.low_rank_pair(site).A for site in adapter.sites))


def test_a_state_dict_with_both_names_is_loaded_too(model):
    """As torch's own save of an older version wrote it."""
    adapter = put(model, **SHARED)
    state = {**model.state_dict()}
    networks = dict(adapter.networks.items())
    for name, network in networks.items():
        state |= {
            f"lortalib.default.networks.{name}.{k}": t for k, t in network.state_dict().items()
        }
    other = FAMILY.model("ForCausalLM")
    put(other, seed=1, **SHARED)
    other.load_state_dict(state)
    assert same_bits(output(other, INPUTS), output(model, INPUTS))


def test_a_missing_factor_is_still_missed(model):
    put(model, **SHARED)
    state = {k: t for k, t in model.state_dict().items() if not k.endswith("in_r")}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_every_tool_that_refuses_shared_memory_saves_it(model, tmp_path):
    adapter = put(model, **SHARED)
    save_model(model, str(tmp_path / "own.safetensors"))
    own = [name for name in load_file(tmp_path / "own.safetensors") if name.startswith("lortalib.")]
    assert len(own) == len(list(adapter.parameters()))
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter.safetensors")) == len(own)
    adapter.merge()
    model.save_pretrained(tmp_path / "merged")
    assert not any("lortalib" in name for name in load_file(tmp_path / "merged/model.safetensors"))


# Copies


def count_modules(thing, kind):
    return sum(isinstance(module, kind) for module in thing.modules())


def reachable(thing, kind, seen=None):
    """Whether an object of a class can be reached over attributes and containers."""
    seen = set() if seen is None else seen
    if isinstance(thing, kind):
        return True
    if id(thing) in seen or isinstance(thing, (torch.Tensor, type, str, int)):
        return False
    seen.add(id(thing))
    inner = [*getattr(thing, "__dict__", {}).values()]
    if isinstance(thing, dict):
        inner += thing.values()
    if isinstance(thing, (list, tuple, set, frozenset)):
        inner += thing
    return any(reachable(each, kind, seen) for each in inner)


def test_a_copy_of_an_adapter_leaves_the_model_where_it_is(model):
    adapter = put(model, train_also=["lm_head"])
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    copied = copy.deepcopy(adapter)
    assert not reachable(copied, type(model))
    assert (copied.is_on_model, copied.active, adapter.active) == (False, False, True)
    with pytest.raises(RuntimeError, match="removed from its model"):
        copied.model  # noqa: B018
    for site in adapter.sites:
        assert same_bits(copied.delta(site), adapter.delta(site))
    own = copied.trained_modules.values(None)["lm_head"]["weight"]
    assert same_bits(own, model.lm_head.weight)
    with torch.no_grad():
        own.zero_()
        for parameter in copied.parameters():
            parameter.zero_()
    assert model.lm_head.weight.any()
    assert adapter.delta(adapter.sites[0]).any()


@pytest.mark.parametrize("state", ["active", "merged", "disabled"])
def test_a_copy_of_a_model_has_a_copy_of_the_adapter(model, state):
    adapter = put(model, train_also=["lm_head"])
    if state == "merged":
        adapter.merge()
    if state == "disabled":
        adapter.disable()
    before = output(model, INPUTS)
    copied = copy.deepcopy(model)
    own = lortalib.nn.adapters(copied)["default"]
    assert own is not adapter
    assert own.model is copied
    assert same_bits(output(copied, INPUTS), before)
    own.remove()
    assert same_bits(output(copied, INPUTS), output(FAMILY.model("ForCausalLM"), INPUTS))
    assert same_bits(output(model, INPUTS), before)


def test_a_copy_of_a_layer_computes_as_the_layer_and_brings_no_model(model):
    put(model)
    layer = model.model.layers[0].self_attn.q_proj
    copied = copy.deepcopy(layer)
    x = torch.randn(2, 3, layer.in_features)
    with torch.no_grad():
        assert same_bits(copied(x), layer(x))
    assert not reachable(copied, type(model))


def test_a_copy_of_a_model_in_a_container_belongs_to_the_copy(model):
    put(model)
    outer = nn.ModuleDict({"inner": model})
    copied = copy.deepcopy(outer)["inner"]
    assert lortalib.nn.adapters(copied)["default"].model is copied
    assert count_modules(copied, type(model)) == 1


# Containers that run whatever is registered in them


def chain():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)).eval()


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m)], ids=["bare", "nested"])
def test_a_sequential_runs_only_its_own_modules(wrap, tmp_path):
    model, x = wrap(chain()), torch.randn(2, 5, 8)
    before, links, known = model(x), len(model), picture(model)
    adapter = put(model, targets=["linear1", "linear2"])
    assert len(model) == links
    assert [type(m) for m in model] == [type(m) for m in wrap(chain())]
    after = model(x)
    assert not close(after, before)
    assert lortalib.nn.adapters(model) == {"default": adapter}
    assert set(adapter.parameters()) <= set(model.parameters())
    adapter.save(tmp_path)
    adapter.merge()
    assert close(model(x), after)
    adapter.unmerge()
    adapter.remove()
    assert changes(known, picture(model)) == []
    assert same_bits(model(x), before)
    lortalib.nn.load(model, tmp_path)
    assert same_bits(model(x), after)


# PEFT around the same projections


def lora_around(model):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("options", [{}, {"acts_on": "stream"}, {"targets": "all"}])
def test_it_merges_and_unmerges_after_peft_has_wrapped_the_projections(model, options):
    adapter = put(model, **options)
    kept = {site.path: bits(model.get_submodule(site.path).weight) for site in adapter.sites}
    wrapped = lora_around(model)
    want = output(wrapped, INPUTS)
    adapter.merge()
    if "acts_on" not in options:
        assert close(output(wrapped, INPUTS), want)
    adapter.unmerge()
    assert same_bits(output(wrapped, INPUTS), want)
    for path, known in kept.items():
        assert torch.equal(bits(model.get_submodule(path).weight), known), path
    adapter.merge()
    adapter.remove()
    unloaded = wrapped.unload()
    assert same_bits(output(unloaded, INPUTS), output(FAMILY.model("ForCausalLM"), INPUTS))


def test_it_goes_on_when_peft_has_taken_its_wrappers_off_again(model):
    adapter = put(model)
    want = output(model, INPUTS)
    wrapped = lora_around(model)
    adapter.merge()
    adapter.unmerge()
    wrapped.unload()
    assert same_bits(output(model, INPUTS), want)
    adapter.merge()
    assert close(output(model, INPUTS), want)
    adapter.remove()
    assert same_bits(output(model, INPUTS), output(FAMILY.model("ForCausalLM"), INPUTS))


def test_it_follows_a_module_that_was_replaced(model):
    adapter = put(model)
    adapter.merge()
    attention = model.model.layers[0].self_attn
    fresh = nn.Linear(attention.q_proj.in_features, attention.q_proj.out_features, bias=False)
    attention.q_proj = fresh
    adapter.unmerge()
    x = torch.randn(1, 2, fresh.in_features)
    delta = adapter.delta("model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        restored = nn.functional.linear(x, fresh.weight)
        assert close(fresh(x), restored + x @ delta.T)


# Numbers that change while they stand in the weights


def other_numbers(adapter, seed):
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            )


def test_the_weights_keep_the_numbers_of_the_merge(model):
    one, two = put(model, name="one"), put(model, name="two", seed=1)
    one.merge()
    want = output(model, INPUTS)
    other_numbers(one, 5)
    two.merge()
    two.unmerge()  # both compute the weights anew
    two.disable()
    two.enable()
    assert close(output(model, INPUTS), want)
    copied = copy.deepcopy(model)
    lortalib.nn.adapters(copied)["one"].remove(merged=True)
    assert close(output(copied, INPUTS), want)
    one.unmerge()
    changed = output(model, INPUTS)
    assert not close(changed, want)
    one.merge()
    assert close(output(model, INPUTS), changed)


# Adapters that PEFT holds


def test_an_adapter_of_peft_is_on_its_model(model):
    wrapped = peft.get_peft_model(model, LortaConfig(rank=2, init_weights=False))
    adapter = wrapped.base_model.lorta_adapters["default"]
    assert adapter.model is model
    assert "removed" not in repr(adapter)
    assert "on LlamaForCausalLM" in repr(adapter)
    site = adapter.sites[0]
    wrapped.merge_adapter()
    base = FAMILY.model("ForCausalLM").get_submodule(site.path).weight
    assert same_bits(adapter.base_weight(site), base)
    calls = [
        ("set_adapter", adapter.enable),
        ("disable_adapter", adapter.disable),
        ("merge_adapter", adapter.merge),
        ("unmerge_adapter", adapter.unmerge),
        ("delete_adapter", adapter.remove),
        ("merge_and_unload", lambda: adapter.remove(merged=True)),
        ("save_pretrained", lambda: adapter.save("nowhere")),
        ("export_lora", lambda: adapter.export_lora("nowhere")),
    ]
    for name, call in calls:
        with pytest.raises(RuntimeError, match=f"PEFT holds the adapter 'default'.*{name}"):
            call()
    copied = copy.deepcopy(wrapped)
    own = copied.base_model.lorta_adapters["default"]
    assert own.model is copied.base_model.model
    wrapped.unmerge_adapter()
    wrapped.delete_adapter("default")
    assert not adapter.is_on_model
    copied.merge_and_unload()
    assert not own.is_on_model
