"""Packed batches: every token names its adapter."""

import pytest
import torch
from adapted import output
from banks import alone, filled, prompts, random_stack, small_llama
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES
from strategies import examples
from transformers import ContinuousBatchingConfig, GenerationConfig

import lortalib
from lortalib.nn._forward import TokenRows

SHARED = {"own sides": (), "shared sides": ("in", "out"), "one shared side": ("in",)}
each_sharing = pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)


def random_bank(model, shared, decomposition="cp", **options):
    """A bank of four random adapters."""
    bank = lortalib.nn.bank(model, decomposition, 2, shared=shared, dtype=torch.float64, **options)
    bank.fill(range(4), random_stack(bank, 4))
    return bank


def packed(lengths):
    """Several prompts in one row, each with positions of its own, and a mask that keeps them apart."""
    ids = prompts(1, sum(lengths))["input_ids"]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    owner = torch.cat([torch.full((n,), k) for k, n in enumerate(lengths)])
    causal = torch.ones(len(owner), len(owner)).tril().bool()
    mask = ((owner[:, None] == owner) & causal)[None, None]
    return {"input_ids": ids, "position_ids": places, "attention_mask": mask}


@each_sharing
@given(data=st.data())
@examples(5)
def test_packed_requests_are_what_they_are_alone(shared, data):
    model = small_llama().double()
    bank = random_bank(
        model, shared, data.draw(st.sampled_from(["cp", "tucker", "lotr", "indscal"]))
    )
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    names = [data.draw(st.sampled_from([0, 1, 2, 3, None])) for _ in lengths]
    inputs = packed(lengths)
    with bank.using([[name for name, n in zip(names, lengths) for _ in range(n)]]):
        found = output(model, inputs)[0].split(lengths)
    for own, ids, name in zip(found, inputs["input_ids"][0].split(lengths), names):
        with bank.using([name]):
            torch.testing.assert_close(own, output(model, {"input_ids": ids[None]})[0])


@each_sharing
def test_one_name_for_all_tokens_of_a_row_is_the_name_of_the_row(shared):
    for family in ("Llama", "Bert", "Conv1D"):
        model, inputs = FAMILIES[family].model().double(), FAMILIES[family].inputs()
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        bank, length = random_bank(model, shared), next(iter(inputs.values())).shape[1]
        with bank.using([2, None]):
            wanted = output(model, inputs)
        with bank.using([[2] * length, [None] * length]):
            torch.testing.assert_close(output(model, inputs), wanted)
        ids = torch.tensor([[2] * length, [1] * length])
        with bank.using(ids), bank.using(torch.tensor([2, 1])):
            by_row = output(model, inputs)
        with bank.using(ids):
            torch.testing.assert_close(output(model, inputs), by_row)


@each_sharing
def test_gradients_pass_through_packed_tokens(shared):
    model = small_llama().double()
    bank = random_bank(model, shared)
    for parameter in bank.shared["layers"]:
        parameter.requires_grad_()
    inputs = packed([3, 4])
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    found = []
    for split in (False, True):
        leaf = embedded.clone().requires_grad_()
        if split:
            for name, part in ((1, leaf[:, :3]), (3, leaf[:, 3:])):
                with bank.using([name]):
                    model(inputs_embeds=part)[0].square().sum().backward()
        else:
            with bank.using([[1] * 3 + [3] * 4]):
                model(inputs_embeds=leaf, **inputs)[0].square().sum().backward()
        found.append([leaf.grad, *(p.grad.clone() for p in bank.shared["layers"])])
        for parameter in bank.shared["layers"]:
            parameter.grad = None
    torch.testing.assert_close(found[0], found[1])


@given(owners=st.lists(st.integers(0, 6), min_size=1, max_size=60))
@examples(50)
def test_rows_of_tokens_take_little_room(owners):
    rows = TokenRows(owners)
    x = torch.arange(1.0, len(owners) + 1)[:, None]
    split = rows.split(x)
    assert torch.equal(rows.join(split), x)
    assert split.numel() < 2 * len(owners) + len({*owners})
    assert len(split) == len(rows.owners) <= 2 * len({*owners})
    for owner, row in zip(rows.owners, split[..., 0].long().tolist()):
        assert {owners[token - 1] for token in row if token} == {owner}


def test_names_that_were_given_in_inference_mode_serve_a_training():
    with torch.inference_mode():
        rows = TokenRows([0, 1, 1])
    x = torch.randn(3, 2, requires_grad=True)
    rows.join(rows.split(x)).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 2))


def test_other_tokens_than_those_named_are_refused():
    model, inputs = small_llama(), prompts(2, 5)
    bank = filled(model)
    for names, error, why in (
        (
            [[1] * 4] * 2,
            ValueError,
            r"2 rows of 4 tokens, but the input of .* has shape \(2, 5, 16\)",
        ),
        ([[1] * 5], ValueError, "1 rows of 5 tokens"),
        ([[1] * 5, [1] * 4], ValueError, "found the lengths 4, 5"),
        ([[1] * 5, 1], TypeError, "found 1 beside lists"),
        ([[], []], ValueError, "found none"),
        ([[[1]] * 5] * 2, TypeError, "found lists within lists"),
        ([[7] * 5] * 2, KeyError, "no adapter 7"),
    ):
        with pytest.raises(error, match=why), bank.using(names):
            output(model, inputs)
    with pytest.raises(ValueError, match="for each forward"), bank.using([[1] * 5] * 2):
        model.generate(**inputs, max_new_tokens=3, pad_token_id=0)


def test_a_tuple_is_a_name_and_no_row_of_names():
    model, inputs = small_llama(), prompts(2, 5)
    bank = filled(model)
    bank["ann", 1] = bank[1]
    with bank.using([("ann", 1), None]):
        found = output(model, inputs)
    torch.testing.assert_close(found[0], alone(model, 1, inputs)[0], atol=3e-5, rtol=1e-4)


def test_continuous_batching_names_the_adapter_of_each_request():
    model = small_llama()
    bank = random_bank(model, ("in", "out"))
    prompts_ = {f"r{k}": list(range(3, 43 + k)) for k in range(6)}  # one prefix of several blocks
    names = dict(zip(prompts_, [0, 1, None, 2, 1, 3]))
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=1, pad_token_id=0)
    unshared = ContinuousBatchingConfig(
        allow_block_sharing=False, num_blocks=64, max_batch_tokens=64
    )
    contexts, found, tokens = [], {}, []

    def enter(module, args, kwargs):
        batch = manager.batch_processor.inputs_and_outputs.requests_in_batch
        row = [names[each.state.request_id] for each in batch for _ in range(each.query_length)]
        tokens.append(len(row))
        row += [None] * (kwargs["input_ids"].shape[1] - len(row))
        contexts.append(bank.using([row]))
        contexts[-1].__enter__()

    def leave(module, args, output):
        contexts.pop().__exit__(None, None, None)

    with model.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=unshared, warmup=False
    ) as manager:
        hooks = [
            model.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
            model.register_forward_hook(leave, always_call=True),
        ]
        for request, ids in prompts_.items():
            manager.add_request(ids, request_id=request, max_new_tokens=5)
        for _ in prompts_:
            answer = manager.get_result(timeout=60)
            found[answer.request_id] = answer.generated_tokens
    for hook in hooks:
        hook.remove()
    assert 0 < min(tokens) < max(tokens)
    for request, ids in prompts_.items():
        with bank.using([names[request]]):
            wanted = model.generate(torch.tensor([ids]), generation_config=settings)
        assert found[request] == wanted[0, len(ids) :].tolist(), request
