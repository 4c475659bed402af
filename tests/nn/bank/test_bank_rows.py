"""Rows of a batch, each with an adapter of its own: what they compute."""

import contextvars
import gc
import threading

import pytest
import torch
from adapted import changes, output, picture, put
from banks import alone, filled, prompts, random_stack, rows_of, small_llama
from models import FAMILIES
from torch._subclasses.fake_tensor import FakeTensorMode

import lortalib
from lortalib.nn import adapters
from lortalib.nn._bank import BatchTensors


@pytest.mark.parametrize("family", ["Llama", "Bert", "Conv1D", "T5", "ViT", "Qwen3"])
def test_every_row_is_its_adapter_alone(family):
    """The law of rows has formats; this has inputs of other kinds, and hooks in place of dense updates."""
    model, inputs = FAMILIES[family].model(), FAMILIES[family].inputs()
    bank = filled(model, "tucker")
    for names in ([3, None], [2, 2], [None, 0]):
        found = rows_of(model, bank, names, inputs)
        for row, name in enumerate(names):
            wanted = alone(model, name, inputs, "tucker")[row]
            torch.testing.assert_close(found[row], wanted, atol=3e-5, rtol=1e-4)
    assert not adapters(model)


def test_outside_a_context_and_after_removal_the_model_is_its_own():
    model, inputs = small_llama(), prompts()
    before, look = output(model, inputs), picture(model)
    bank = filled(model)
    assert torch.equal(output(model, inputs), before)
    assert torch.equal(rows_of(model, bank, [None, None], inputs), before)
    bank.remove()
    assert changes(look, picture(model)) == []


def test_what_rows_gathered_is_freed_with_their_context():
    def alive():
        gc.collect()
        return sum(type(each) is BatchTensors for each in gc.get_objects())

    model, inputs = small_llama(), prompts()
    bank, before = filled(model), alive()
    rows_of(model, bank, [0, 1], inputs)
    with bank.using([0, None]), bank.using([1, 2]):
        output(model, inputs)
    assert alive() == before


def test_generation_with_beams_padding_and_several_sequences():
    model = small_llama()
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


def test_an_adapter_on_the_model_adds_to_the_rows():
    model, inputs = small_llama(), prompts()
    bank = filled(model)
    both = put(model, seed=9, alpha=0.5, name="both")
    found = rows_of(model, bank, [None, 1], inputs)
    torch.testing.assert_close(found[0], output(model, inputs)[0])
    other = put(model, seed=1, alpha=0.5, name="one")
    torch.testing.assert_close(found[1], output(model, inputs)[1], atol=3e-5, rtol=1e-4)
    both.remove()
    other.remove()


def test_each_thread_has_a_choice_of_its_own():
    model, inputs = small_llama(), prompts()
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
    model, inputs = small_llama(), prompts()
    bank = filled(model)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    with bank.using([1, None]):
        model(inputs_embeds=embedded)[0].square().sum().backward()
    adapter = put(model, seed=1, alpha=0.5)
    wanted = embedded.detach().clone().requires_grad_()
    model(inputs_embeds=wanted)[0][0].square().sum().backward()
    torch.testing.assert_close(embedded.grad[0], wanted.grad[0], atol=1e-4, rtol=1e-4)
    adapter.remove()


def test_a_model_of_low_precision_gets_pairs_of_full_precision():
    model, inputs = small_llama().bfloat16(), prompts()
    bank = filled(model)
    wanted = put(model, seed=1, alpha=0.5)
    site = wanted.sites[0]
    cut = wanted.low_rank_pair(site)
    wanted.remove()
    seen = []
    forward = lortalib.nn._forward
    down, add_up = forward.scope.down, forward.update.add_up

    def watched_down(x, a, *rest):
        seen.append(a)
        return down(x, a, *rest)

    def watched_add_up(y, h, b, *rest):
        seen.append(b)
        return add_up(y, h, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lortalib.nn._forward.scope.down", watched_down)
        patch.setattr("lortalib.nn._forward.update.add_up", watched_add_up)
        rows_of(model, bank, [1, None], inputs)
    assert torch.equal(seen[0][0], (cut.A * 0.5).bfloat16())
    assert torch.equal(seen[1][0], cut.B.mT.bfloat16())  # not a product of rounded factors
    assert len(seen) == 2 * (2 + 4)  # in each layer x is read once for q, k and v


def test_a_bank_made_and_grown_in_inference_mode_works_outside():
    model, inputs = small_llama(), prompts()
    adapter = put(model, seed=1, alpha=0.5)
    wanted = output(model, inputs)
    adapter.disable()
    with torch.inference_mode():
        bank = lortalib.nn.bank(model, "cp", 2, capacity=1)
        bank[0] = adapter
        bank[1] = bank[2] = bank[0]  # grows
        assert not any(t.is_inference() for ts in bank[1].values() for t in ts)
    bank[1] = bank[0]
    bank.fill(["f"], {name: [t[None] for t in ts] for name, ts in bank[0].items()})
    bank.update(dict.fromkeys(range(10), adapter))
    del bank[0]
    bank[0] = adapter
    for name in (0, 1, "f"):
        torch.testing.assert_close(
            rows_of(model, bank, [name, name], inputs), wanted, atol=3e-5, rtol=1e-4
        )


def test_one_context_serves_forwards_in_any_mode():
    model, inputs = small_llama(), prompts()
    bank = filled(model)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    with torch.inference_mode():
        context = bank.using([1, None])
        context.__enter__()
        wanted = model(**inputs)[0]
    found = model(inputs_embeds=embedded)[0]
    context.__exit__(None, None, None)
    found.square().sum().backward()
    assert embedded.grad.abs().max() > 0
    torch.testing.assert_close(found.detach(), wanted.clone())


def test_transforms_and_traces_leave_nothing_in_a_context():
    model, inputs = small_llama(), prompts()
    bank = filled(model)
    wanted = rows_of(model, bank, [1, None], inputs)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()

    def loss(embedded):
        return model(inputs_embeds=embedded)[0].square().sum()

    with bank.using([1, None]):
        found = torch.func.grad(loss)(embedded)
        loss(embedded.requires_grad_()).backward()
        torch.testing.assert_close(found, embedded.grad)
    with bank.using([1, None]):
        with FakeTensorMode(allow_non_fake_inputs=True):
            output(model, inputs)
        torch.testing.assert_close(output(model, inputs), wanted)


def test_a_line_may_have_a_bond_of_the_name_of_the_banks_own_mode():
    line = "in adapter, out adapter, head adapter, layer adapter, matrix adapter"
    model, inputs = small_llama(), prompts()
    bank = filled(model, line)
    found = rows_of(model, bank, [1, None], inputs)
    torch.testing.assert_close(found[0], alone(model, 1, inputs, line)[0], atol=3e-5, rtol=1e-4)


def test_contexts_close_in_any_order():
    model, inputs = small_llama(), prompts()
    bank = filled(model)
    plain = output(model, inputs)
    alone = {name: rows_of(model, bank, [name], inputs) for name in (0, 1)}

    def generator(name):
        with bank.using([name]):
            yield

    one, two = generator(0), generator(1)
    next(one), next(two)
    one.close()
    assert torch.equal(output(model, inputs), alone[1])
    two.close()
    assert torch.equal(output(model, inputs), plain)
    with bank.using([0]):
        elsewhere = generator(1)
        contextvars.copy_context().run(next, elsewhere)
        elsewhere.close()
        assert torch.equal(output(model, inputs), alone[0])


def test_a_merge_within_a_context_of_a_bank_on_the_stream_is_refused():
    model, inputs = small_llama(), prompts()
    bank = lortalib.nn.bank(model, "in r, out r, layer matrix r", 2, acts_on="stream")
    bank.fill([0], random_stack(bank, 1))
    adapter = put(model)
    with bank.using([0]):
        output(model, inputs)
        adapter.merge()
        with pytest.raises(ValueError, match="merged into its weight; unmerge it first"):
            output(model, inputs)
        adapter.unmerge()
        output(model, inputs)
