"""Weights that torch computes from other parameters in each forward: adapted, and not merged."""

import peft
import pytest
import torch
from adapted import close, output, put, same_bits
from banks import prompts, small_llama
from torch.nn.utils import parametrizations, parametrize, prune

import lortalib
from lortalib.peft import LortaConfig


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def doubled(module):
    parametrize.register_parametrization(module, "weight", Doubled())


def pruned(module):
    prune.l1_unstructured(module, "weight", amount=0.5)


COMPUTED = {
    "parametrize": doubled,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "prune": pruned,
}
ON = {"weights": {}, "stream": {"decomposition": "indscal", "acts_on": "stream"}}
each_way = pytest.mark.parametrize("way", COMPUTED)


def model_of(way):
    model = small_llama()
    if way is not None:
        for layer in model.model.layers:
            COMPUTED[way](layer.self_attn.v_proj)
    return model.eval()


@pytest.mark.parametrize("acts_on", ON)
@each_way
def test_a_computed_weight_is_not_merged(way, acts_on, tmp_path):
    model = model_of(way)
    before = output(model, prompts())
    adapter = put(model, **ON[acts_on])
    expected = output(model, prompts())
    assert not close(expected, before)
    with pytest.raises(
        ValueError, match=r"v_proj is computed from other parameters in each forward"
    ):
        adapter.merge()
    assert not adapter.merged
    assert same_bits(output(model, prompts()), expected)
    if acts_on == "stream":  # its LoRA would be made of what is stored
        with pytest.raises(ValueError, match="is computed from other parameters"):
            lortalib.nn.export_lora(adapter, tmp_path)
    adapter.remove()
    assert same_bits(output(model, prompts()), before)


@each_way
def test_what_was_merged_is_taken_out_when_the_weight_is_ordinary_again(way):
    model = small_llama()
    adapter = put(model)
    before = output(model, prompts())
    adapter.disable()
    base = output(model, prompts())
    adapter.merge()
    module = model.model.layers[0].self_attn.v_proj
    COMPUTED[way](module)
    computed = output(model.eval(), prompts())
    for verb in (adapter.unmerge, adapter.disable, adapter.remove):
        with pytest.raises(ValueError, match="is computed from other parameters"):
            verb()
        assert adapter.merged
        assert same_bits(output(model, prompts()), computed)
    if way == "prune":
        prune.remove(module, "weight")
    else:
        parametrize.remove_parametrizations(module, "weight")
    adapter.unmerge()
    assert close(output(model, prompts()), before)
    adapter.remove()
    assert same_bits(output(model, prompts()), base)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
@each_way
def test_peft_does_not_merge_a_computed_weight(way, verb):
    config = LortaConfig(rank=2, init_weights="normal", target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model_of(way), config).eval()
    expected = output(model, prompts())
    with pytest.raises(ValueError, match=r"v_proj is computed from other parameters"):
        getattr(model, verb)()
    assert same_bits(output(model, prompts()), expected)


def test_peft_does_not_take_an_update_out_of_a_computed_weight():
    config = LortaConfig(rank=2, init_weights="normal", target_modules=["v_proj"])
    model = peft.get_peft_model(small_llama(), config).eval()
    model.merge_adapter()
    doubled(model.base_model.model.model.layers[1].self_attn.v_proj.base_layer)
    expected = output(model, prompts())
    with pytest.raises(ValueError, match=r"layers\.1\..* is computed from other parameters"):
        model.unmerge_adapter()
    assert same_bits(output(model, prompts()), expected)  # that of layer 0 is not taken out alone


# Weights that are read directly


class Kept(torch.nn.Module):
    def forward(self, weight):
        return weight


OF_A_NAME = {
    "parametrize": lambda m, name: parametrize.register_parametrization(m, name, Kept()),
    "prune": lambda m, name: prune.l1_unstructured(m, name, amount=0.5),
    "weight_norm": torch.nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("way", OF_A_NAME)
def test_a_weight_that_is_read_directly_is_not_computed_too(way):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 3, 32)
    base = model(x)
    attention = model.layers[0].self_attn
    adapter = put(model)
    want = model(x)
    with pytest.raises(RuntimeError, match="would take the weight 'in_proj_weight' together with"):
        OF_A_NAME[way](attention, "in_proj_weight")
    assert torch.equal(model(x), want)
    adapter.remove()
    assert torch.equal(model(x), base)
    OF_A_NAME[way](attention, "in_proj_weight")
    with pytest.raises(ValueError, match=r"is computed from other parameters .* read directly"):
        put(model)
    assert close(model(x), base) or way == "prune"
