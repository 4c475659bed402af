"""Copies of a model and its bank, and the end of a bank."""

import copy
import io
import pickle

import pytest
import torch
from adapted import output, unchanged
from banks import constant, equal_tensors, filled, prompts, rows_of, small_llama
from transformers import LlamaConfig, LlamaForCausalLM

import lortalib


def test_a_copy_of_the_model_has_a_bank_of_its_own():
    model, inputs = small_llama(), prompts()
    bank = filled(model)
    wanted = rows_of(model, bank, [1, None], inputs)
    other, own = copy.deepcopy((model, bank))
    torch.testing.assert_close(rows_of(other, own, [1, None], inputs), wanted)
    own.remove()
    torch.testing.assert_close(rows_of(model, bank, [1, None], inputs), wanted)
    assert not torch.allclose(output(other, inputs), wanted)


def test_a_pickled_model_and_its_bank_belong_together():
    model, inputs = small_llama(), prompts()
    bank = filled(model)
    wanted = rows_of(model, bank, [1, None], inputs)
    for copied in (
        lambda: pickle.loads(pickle.dumps((model, bank))),
        lambda: pickle.loads(pickle.dumps((bank, model)))[::-1],
        lambda: copy.deepcopy((bank, model))[::-1],
    ):
        other, own = copied()
        before = output(other, inputs)
        torch.testing.assert_close(rows_of(other, own, [1, None], inputs), wanted)
        own["new"] = own[1]
        assert "new" not in bank
        torch.testing.assert_close(rows_of(other, own, ["new", None], inputs), wanted)
        own.remove()
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in other.modules())
        torch.testing.assert_close(output(other, inputs), before)


def test_a_copy_of_the_model_alone_does_not_carry_the_adapters():
    model, inputs = small_llama(), prompts()
    bare = len(pickle.dumps(model))
    bank = lortalib.nn.bank(model, "cp", 2, capacity=10_000)
    bank.fill(range(10_000), constant(bank, 1, 10_000))
    stream = io.BytesIO()
    torch.save(model, stream)
    assert len(pickle.dumps(model)) < bare + bank.nbytes / 10
    assert stream.tell() < bare + bank.nbytes / 10
    with bank.using([1, 2]):
        torch.testing.assert_close(
            output(copy.deepcopy(model), inputs), output(small_llama(), inputs), atol=0, rtol=0
        )


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))], ids=["copy", "pickle"]
)
def test_a_copy_of_the_bank_alone_leaves_its_model_out(copied, tmp_path):
    model, inputs = small_llama(), prompts()
    bank = filled(model)
    wanted = rows_of(model, bank, [1, None], inputs)
    alone = copied(bank)
    assert "Bank on no model: 4 adapters" in repr(alone)
    assert all(equal_tensors(alone[name], bank[name]) for name in bank)
    alone["new"] = alone[1]
    for call in (
        lambda: alone.using([1]).__enter__(),
        lambda: alone.save(tmp_path / "bank"),
        lambda: alone.load(bank.save(tmp_path)),
        lambda: alone.add("other", bank.adapter(1).save(tmp_path / "one", model=model)),
    ):
        with pytest.raises(RuntimeError, match="a copy without its model"):
            call()
    again = lortalib.nn.bank(small_llama(), "cp", 2)
    again.update(alone)
    assert all(equal_tensors(again[name], alone[name]) for name in alone)
    alone.remove()  # nothing is there to take off
    torch.testing.assert_close(rows_of(model, bank, [1, None], inputs), wanted)


def test_a_pickled_bank_is_as_large_as_its_own():
    bank = lortalib.nn.bank(small_llama(), "cp", 2)
    small = len(pickle.dumps(bank))
    wide = LlamaForCausalLM(LlamaConfig(
        vocab_size=5000, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    ))  # fmt: skip
    assert len(pickle.dumps(lortalib.nn.bank(wide, "cp", 2))) < 2 * small < len(pickle.dumps(wide))


def test_a_removed_bank_says_so():
    model = small_llama()
    bank = filled(model)
    bank.remove()
    with unchanged(model):
        bank.remove()  # may be called again
        with pytest.raises(RuntimeError, match="removed from its model"), bank.using([1]):
            pass
        assert bank[1]
