"""Weights that something else has written while an update was merged into them: nothing is lost silently."""

import copy

import peft
import pytest
import torch
from adapted import bits, close, output, put, same_bits
from models import FAMILIES

import lortalib

INPUTS = {"input_ids": torch.tensor([[1, 2, 3, 4]])}


def llama():
    return FAMILIES["Llama"].model("ForCausalLM").eval()


def weights(model):
    return {
        name: bits(p)
        for name, p in model.named_parameters()
        if "lortalib" not in name.split(".") and "lora_" not in name
    }


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("order", ["part first", "whole first"])
def test_a_model_and_a_part_of_it_do_not_merge_into_one_weight(order):
    model = llama()
    first = [model.model, model] if order == "part first" else [model, model.model]
    one, two = (put(each, "lora", name=f"a{k}", seed=k) for k, each in enumerate(first))
    base, want = weights(model), output(model, INPUTS)
    one.merge()
    merged = weights(model)
    with pytest.raises(ValueError, match=r"an adapter of another model, .* is merged into it"):
        two.merge()
    assert same(weights(model), merged)
    assert not two.merged
    assert close(output(model, INPUTS), want)
    one.unmerge()
    assert same(weights(model), base)
    two.merge()
    assert close(output(model, INPUTS), want)
    two.unmerge()
    one.remove()
    two.remove()
    assert same_bits(output(model, INPUTS), output(llama(), INPUTS))


def test_what_became_part_of_the_base_does_not_count():
    model = llama()
    one, two = put(model.model, "lora"), put(model, "lora", seed=1)
    want = output(model, INPUTS)
    one.remove(merged=True)
    two.merge()
    assert close(output(model, INPUTS), want)
    copied = copy.deepcopy(model)
    lortalib.nn.adapters(copied)["default"].unmerge()
    two.unmerge()
    assert same_bits(output(copied.eval(), INPUTS), output(model, INPUTS))


def test_an_update_is_not_taken_out_below_what_peft_merged_later():
    model = llama()
    adapter = put(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    base, want = weights(wrapped), output(wrapped, INPUTS)
    adapter.merge()
    merged = weights(wrapped)
    wrapped.merge_adapter()
    both = weights(wrapped)
    with pytest.raises(ValueError, match=r"PEFT had merged .* when an update was merged"):
        adapter.unmerge()
    assert same(weights(wrapped), both)
    assert adapter.merged
    wrapped.unmerge_adapter()
    adapter.unmerge()
    assert same(weights(wrapped), base)
    assert close(output(wrapped, INPUTS), want)
    assert not same(base, merged)


def test_a_weight_that_was_quantised_since_is_named():
    quantization = pytest.importorskip("torchao.quantization")
    model = llama()
    adapter = put(model)
    adapter.merge()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    want = output(model, INPUTS)
    with pytest.raises(ValueError, match="was quantised after an update was merged into it"):
        adapter.unmerge()
    assert adapter.merged
    adapter.remove(merged=True)
    assert same_bits(output(model, INPUTS), want)


def test_a_layer_that_was_taken_out_is_named():
    model = llama()
    adapter = put(model)
    kept = model.model.layers
    model.model.layers = kept[:1]
    with pytest.raises(AttributeError, match=r"layers\.1\..* was taken out of the model"):
        adapter.merge()
    model.model.layers = kept
    adapter.merge()
    adapter.unmerge()
