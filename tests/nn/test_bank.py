"""A bank: every row of a batch with an adapter of its own is that adapter alone on the model."""

import copy
import tempfile
import threading

import pytest
import torch
from harness import changes, each_format, output, picture, put
from models import FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM, LongformerConfig, LongformerModel

import lortalib
from lortalib.nn import adapters

EASY = ("Llama", "Bert", "Conv1D", "T5", "ViT", "Qwen3")
FAMILY = {name: FAMILIES[name] for name in EASY}


def filled(model, decomposition="cp", rank=2, number=4, **options):
    """A bank with so many random adapters, and the model's output with each alone."""
    bank = lortalib.nn.bank(model, decomposition, rank, capacity=2, **options)
    for seed in range(number):
        adapter = put(model, decomposition, rank, seed=seed, alpha=0.5)
        bank[seed] = adapter
        adapter.remove()
    return bank


def alone(model, seed, inputs, decomposition="cp", rank=2):
    """The output with one of these adapters on the model, or none."""
    if seed is None:
        return output(model, inputs)
    adapter = put(model, decomposition, rank, seed=seed, alpha=0.5)
    found = output(model, inputs)
    adapter.remove()
    return found


def rows_of(model, bank, names, inputs):
    with bank.using(names):
        return output(model, inputs)


@pytest.mark.parametrize("family", sorted(FAMILY))
@each_format
def test_every_row_is_its_adapter_alone(family, decomposition):
    model, inputs = FAMILY[family].model().eval(), FAMILY[family].inputs()
    bank = filled(model, decomposition)
    number = len(next(iter(inputs.values())))
    for names in ([3, None, 1], [2, 2, 0], [None, 0, 3]):
        names = (names * number)[:number]
        found = rows_of(model, bank, names, inputs)
        for row, name in enumerate(names):
            wanted = alone(model, name, inputs, decomposition)[row]
            torch.testing.assert_close(found[row], wanted, atol=3e-5, rtol=1e-4)
    assert not adapters(model)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(rows=2, length=5):
    draw = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, 60, (rows, length), generator=draw)}


def test_outside_a_context_and_after_removal_the_model_is_its_own():
    model, inputs = llama(), prompts()
    before, look = output(model, inputs), picture(model)
    bank = filled(model)
    assert torch.equal(output(model, inputs), before)
    assert torch.equal(rows_of(model, bank, [None, None], inputs), before)
    bank.remove()
    assert changes(look, picture(model)) == []


def test_generation_with_beams_padding_and_several_sequences():
    model = llama()
    bank = filled(model)
    ids = prompts(3, 6)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for options in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {}):
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
        with bank.using([1, None, 3]):
            found = model.generate(ids, attention_mask=mask, **options)
        copies = options.get("num_return_sequences", 1)
        for row, seed in enumerate((1, None, 3)):
            adapter = None if seed is None else put(model, seed=seed, alpha=0.5)
            one = slice(row, row + 1)
            wanted = model.generate(ids[one], attention_mask=mask[one], **options)
            if adapter is not None:
                adapter.remove()
            own = found[row * copies : (row + 1) * copies, : wanted.shape[1]]
            assert torch.equal(own, wanted)


def test_replacing_deleting_and_growing():
    model, inputs = llama(), prompts()
    bank = filled(model, number=5)
    assert len(bank) == 5 <= bank.capacity
    first = rows_of(model, bank, [0, 1], inputs)
    with bank.using([0, 1]):
        bank[0] = {name: [2 * values[0], *values[1:]] for name, values in bank[0].items()}
        torch.testing.assert_close(output(model, inputs), first)  # this context keeps its own
    changed = rows_of(model, bank, [0, 1], inputs)
    assert (changed[0] - first[0]).abs().max() > 1e-3
    torch.testing.assert_close(changed[1], first[1])
    del bank[0]
    assert 0 not in bank
    with pytest.raises(KeyError, match="no adapter 0 in the bank, which holds 4"):
        rows_of(model, bank, [0, 1], inputs)
    bank["new"] = bank[1]  # takes the free place
    found = rows_of(model, bank, ["new", 2], inputs)
    torch.testing.assert_close(found[0], first[0] * 0 + rows_of(model, bank, [1, 2], inputs)[0])


def test_filling_is_adding_one_by_one():
    model, inputs = llama(), prompts()
    bank = filled(model, number=3)
    again = lortalib.nn.bank(copy.deepcopy(llama()), "cp", 2)
    stacked = {
        name: [torch.stack(values) for values in zip(*(bank[k][name] for k in range(3)))]
        for name in bank[0]
    }
    again.fill(["a", "b", "c"], stacked)
    for k, name in enumerate("abc"):
        for group, tensors in again[name].items():
            assert all(torch.equal(one, other) for one, other in zip(tensors, bank[k][group]))
    with pytest.raises(ValueError, match="new names"):
        again.fill(["a"], {name: [t[:1] for t in ts] for name, ts in stacked.items()})
    assert len(again) == 3
    assert rows_of(model, bank, [2, 1], inputs).isfinite().all()


def test_a_saved_adapter_is_added_by_its_folder():
    model, inputs = llama(), prompts()
    bank = lortalib.nn.bank(model, "cp", 2)
    adapter = put(model, seed=7, alpha=0.5)
    folder = adapter.save(tempfile.mkdtemp())
    wanted = output(model, inputs)
    adapter.remove()
    bank["saved"] = folder
    torch.testing.assert_close(rows_of(model, bank, ["saved", "saved"], inputs), wanted)


def test_half_precision_storage_and_its_size():
    model, inputs = llama(), prompts()
    bank = filled(model, dtype=torch.bfloat16)
    assert bank.nbytes == 4 * bank.count() * 2
    full = alone(model, 1, inputs)[0]
    base = output(model, inputs)[0]
    found = rows_of(model, bank, [1, None], inputs)[0]
    assert (found - full).abs().max() < 0.05 * (full - base).abs().max()


def test_an_adapter_on_the_model_adds_to_the_rows():
    model, inputs = llama(), prompts()
    bank = filled(model)
    both = put(model, seed=9, alpha=0.5, name="both")
    found = rows_of(model, bank, [None, 1], inputs)
    torch.testing.assert_close(found[0], output(model, inputs)[0])
    other = put(model, seed=1, alpha=0.5, name="one")
    torch.testing.assert_close(found[1], output(model, inputs)[1], atol=3e-5, rtol=1e-4)
    both.remove()
    other.remove()


def test_each_thread_has_a_choice_of_its_own():
    model, inputs = llama(), prompts()
    bank = filled(model)
    wanted = {k: rows_of(model, bank, [k, k], inputs) for k in range(4)}
    wrong = []

    def work(k):
        for _ in range(10):
            if not torch.allclose(rows_of(model, bank, [k, k], inputs), wanted[k], atol=1e-5):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_pass_through_the_rows():
    model, inputs = llama(), prompts()
    bank = filled(model)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    with bank.using([1, None]):
        model(inputs_embeds=embedded)[0].square().sum().backward()
    adapter = put(model, seed=1, alpha=0.5)
    wanted = embedded.detach().clone().requires_grad_()
    model(inputs_embeds=wanted)[0][0].square().sum().backward()
    torch.testing.assert_close(embedded.grad[0], wanted.grad[0], atol=1e-4, rtol=1e-4)
    adapter.remove()


def test_a_batch_that_the_rows_do_not_divide_is_refused():
    model = llama()
    bank = filled(model)
    with pytest.raises(
        ValueError, match="named 3 rows, but the model was called with a batch of 2"
    ):
        rows_of(model, bank, [0, 1, 2], prompts(2))
    with pytest.raises(ValueError, match="needs a name"):
        rows_of(model, bank, [], prompts(2))


def test_what_does_not_fit_is_refused_and_nothing_changes():
    model = llama()
    bank = filled(model)
    before = {k: bank[k] for k in bank}
    other = put(llama(), rank=3)
    lotr = put(llama(), "lotr", 2)
    some = put(llama(), targets="q")
    nan = {name: [t * float("nan") for t in ts] for name, ts in bank[0].items()}
    for source, why in (
        (other, "tensors of the shapes"),
        (lotr, "has the legs"),
        (some, "other projections"),
        (nan, "NaN or infinity"),
        ({}, "does not fit"),
    ):
        with pytest.raises(ValueError, match=why):
            bank.update({0: bank[1], "x": source})
    with pytest.raises(ValueError, match="None stands for rows"):
        bank.add(None, bank[0])
    for k, groups in before.items():
        assert all(torch.equal(a, b) for g in groups for a, b in zip(groups[g], bank[k][g]))
    assert "x" not in bank


def test_a_copy_of_the_model_has_a_bank_of_its_own():
    model, inputs = llama(), prompts()
    bank = filled(model)
    wanted = rows_of(model, bank, [1, None], inputs)
    other, own = copy.deepcopy((model, bank))
    torch.testing.assert_close(rows_of(other, own, [1, None], inputs), wanted)
    own.remove()
    torch.testing.assert_close(rows_of(model, bank, [1, None], inputs), wanted)
    assert not torch.allclose(output(other, inputs), wanted)


def test_attention_with_time_before_batch_is_refused():
    config = LongformerConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        attention_window=[4], vocab_size=30,
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not see the batch as rows"):
        lortalib.nn.bank(LongformerModel(config))


def test_wrong_arguments_are_refused():
    for options in ({"capacity": 0}, {"alpha": 0.0}, {"capacity": 1.5}, {"alpha": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            lortalib.nn.bank(llama(), "cp", 2, **options)
