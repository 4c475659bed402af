"""Faults that were found by trying to break the library, each with the right value."""

import gc

import pytest
import torch
from adapted import close, output, put
from models import FAMILIES, words
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralModel

from lortalib import nn


def llama(**options):
    return FAMILIES["Llama"].model("ForCausalLM", **options)


def interrupted(model, module):
    """A forward that a user stops inside of a module."""

    def stop(*_):
        raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        output(model, words())
    handle.remove()


@pytest.mark.parametrize("where", ["model.layers.1.self_attn", "lm_head", "model.layers.0.mlp"])
@pytest.mark.parametrize("part", ["whole", "body"])
def test_behind_an_interrupt_the_numbers_are_the_new_ones(where, part):
    """Also such as were written past torch's count of versions, and whatever part is called next."""
    model = llama()
    adapter = put(model)
    output(model, words())
    interrupted(model, model.get_submodule(where))
    called = model if part == "whole" else model.model
    for parameter in adapter.parameters():
        parameter.data.mul_(-1.5)
    found = output(called, words())
    adapter.merge()
    assert close(found, output(called, words()))
    adapter.unmerge()


def test_a_removed_adapter_is_freed_with_its_graph_and_pairs():
    model = llama()
    counts = []
    for _ in range(4):
        adapter = put(model)
        model(**words())[0].sum().backward()
        adapter.merge()
        adapter.unmerge()
        adapter.remove()
        del adapter
        gc.collect()
        counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert len(set(counts[1:])) == 1


def test_a_weight_that_another_module_has_is_not_merged_into():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.model.layers[0].self_attn.k_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    adapter = put(model, targets="q")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"q_proj is also that of .*k_proj"):
        adapter.merge()
    assert not adapter.merged
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_plan_of_an_mlp_is_verified_by_its_effect():
    model = llama()
    assert nn.apply(model, targets="mlp", verify_with=words()).active
    nn.adapters(model)["default"].remove()
    for layer in model.model.layers:
        layer.mlp.forward = lambda x: x
    with pytest.raises(nn.UnsupportedModelError, match="change nothing"):
        nn.apply(model, targets="mlp", verify_with=words())
    assert not nn.adapters(model)
    assert not hasattr(model, "lortalib")


def test_the_count_of_a_lora_is_that_of_its_modules():
    """Experts have a pair each, a fused projection has one."""
    model = MixtralModel(
        MixtralConfig(
            num_hidden_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=24, vocab_size=64, num_local_experts=3, head_dim=8,
        )
    )  # fmt: skip
    planned = nn.plan(model, "cp", 2, targets="mlp", device="meta")
    assert planned.lora_count(2) == 2 * 3 * ((48 + 16) + (16 + 24))


def test_names_of_parameters_may_meet_names_of_attributes(tmp_path):
    line = "in dense, out dense, head dense, layer dense, matrix dense, dense"
    model = llama()
    adapter = put(model, line, targets="qo")
    found = output(model, words())
    adapter.save(tmp_path)
    adapter.remove()
    nn.load(model, tmp_path)
    assert close(output(model, words()), found)


def test_pairs_are_compared_again_behind_a_context_in_which_the_adapter_was_merged():
    model = llama()
    adapter = put(model)
    with adapter.keep_pairs():
        output(model, words())
        adapter.merge()
        adapter.unmerge()
    before = output(model, words())
    for parameter in adapter.parameters():
        parameter.data.mul_(-1.5)  # leaves no trace but the numbers
    assert not close(output(model, words()), before)


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": torch.nn.DataParallel,
    "both": lambda model: torch.nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_its_plain_one_to_every_verb(wrap, tmp_path):
    model = llama()
    wrapped = wrap(model)
    adapter = nn.apply(wrapped, "cp", 2, init="normal")
    assert [site.path for site in adapter.sites] == [site.path for site in nn.sites(model)]
    assert nn.adapters(wrapped) == nn.adapters(model) == {"default": adapter}
    found = output(model, words())
    adapter.save(tmp_path / "own")
    adapter.export_lora(tmp_path / "lora")
    nn.set_active(wrapped, [])
    adapter.remove()
    for load, folder in ((nn.load, "own"), (nn.load_lora, "lora")):
        for target in (wrapped, model):
            again = load(target, tmp_path / folder, name="again")
            assert again.model is model
            assert close(output(model, words()), found)
            again.remove()
    assert nn.plan(wrapped, "cp", 2, device="meta").count() == adapter.count()
    bank = nn.bank(wrapped, "cp", 2)
    bank["a"] = tmp_path / "own"
    with bank.using(["a"] * 2):
        assert close(output(model, words()), found)
    bank.remove()
