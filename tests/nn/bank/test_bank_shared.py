"""Adapters that share their wide sides: where these come from, what leaves the bank, what it costs."""

import copy
import threading

import pytest
import torch
from adapted import close, output, put
from banks import constant, prompts, random_stack, rows_of, small_llama
from models import FAMILIES
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

import lortalib

SIDES = ("in", "out")


def shared_bank(model, decomposition="cp", rank=2, shared=SIDES, **options):
    return lortalib.nn.bank(model, decomposition, rank, shared=shared, **options)


def trained(model, base, seed, **options):
    """An adapter on the shared sides of another, with random numbers of its own."""
    return put(model, seed=seed, shared=base, alpha=0.5, **options)


def test_adapters_are_trained_on_the_sides_of_one_and_served_together():
    model, inputs = small_llama(), prompts()
    base = put(model, seed=1, shared=SIDES, alpha=0.5, name="base")
    assert str(base.networks["layers"].legs).startswith("in r (shared), out r (shared), head r")
    base.disable()
    bank, alone = shared_bank(model), {}
    for seed in (2, 3):
        adapter = trained(model, base, seed)
        sides = [p for p in adapter.networks["layers"].parameters() if not p.requires_grad]
        assert [tuple(p.shape) for p in sides] == [(16, 2), (8, 2)]
        output(model, inputs)
        model(**inputs)[0].square().mean().backward()
        with torch.no_grad():
            for parameter in adapter.networks.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        alone[seed] = output(model, inputs)
        bank[seed] = adapter
        adapter.remove()
        for one, other in zip(sides, base.networks["layers"].parameters()):
            assert torch.equal(one, other)
    bank["base"] = base
    base.enable()
    alone["base"] = output(model, inputs)
    base.remove()
    for names in ([2, 3], ["base", 2]):
        found = rows_of(model, bank, names, inputs)
        for row, name in enumerate(names):
            torch.testing.assert_close(found[row], alone[name][row], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("init", ["invariant", "lorta"])
def test_a_fresh_adapter_on_shared_sides_changes_nothing_and_trains(init):
    model, inputs = small_llama(), prompts()
    before = output(model, inputs)
    bank = shared_bank(model)
    adapter = lortalib.nn.apply(model, "cp", 2, shared=bank, init=init)
    assert torch.equal(output(model, inputs), before)
    assert adapter.count() == bank.count() == 2 * (4 + 2 + 4)
    model(**inputs)[0].square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    bank["fresh"] = adapter


def test_other_sides_are_refused_and_nothing_changes():
    model = small_llama()
    bank = shared_bank(model)
    first, other = put(small_llama(), seed=1), put(small_llama(), seed=2)
    drawn = [p.clone() for p in bank.shared["layers"]]
    with pytest.raises(ValueError, match="'a' and 'b' have different shared parameters"):
        bank.update({"a": first, "b": other})
    broken = put(small_llama(), seed=3)
    with torch.no_grad():
        broken.networks["layers"].get_parameter("in_r")[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in a shared parameter"):
        bank["x"] = broken
    assert len(bank) == 0
    assert all(map(torch.equal, drawn, bank.shared["layers"]))
    bank["first"] = first
    kept = bank["first"], [p.clone() for p in bank.shared["layers"]]
    for name in ("other", "first"):
        with pytest.raises(ValueError, match="has other shared parameters in group 'layers'"):
            bank[name] = other
    assert list(bank) == ["first"]
    assert all(map(torch.equal, kept[0]["layers"], bank["first"]["layers"]))
    assert all(map(torch.equal, kept[1], bank.shared["layers"]))
    del bank["first"]
    bank["other"] = other
    assert torch.equal(bank.shared["layers"][0], other.networks["layers"].get_parameter("in_r"))


def test_a_failed_call_leaves_the_shared_parameters_of_an_empty_bank(monkeypatch):
    bank = shared_bank(small_llama())
    before = [p.clone() for p in bank.shared["layers"]]

    class Full(dict):
        def update(self, *args):
            raise KeyboardInterrupt

    monkeypatch.setattr(bank._store, "_places", Full())
    with pytest.raises(KeyboardInterrupt):
        bank["x"] = put(small_llama(), seed=1)
    assert all(map(torch.equal, before, bank.shared["layers"]))


@pytest.mark.parametrize("decomposition", ["cp", "indscal", "tucker"])
def test_what_leaves_the_bank_is_an_ordinary_adapter(decomposition, tmp_path):
    model, inputs = small_llama(), prompts()
    bank = shared_bank(model, decomposition, alpha=2.0)
    source = put(small_llama(), decomposition, 2, seed=1, alpha=0.5)
    bank["ann"] = source
    wanted = rows_of(model, bank, ["ann", "ann"], inputs)
    out = bank.adapter("ann")
    out.save(tmp_path / "own", model=model)
    lortalib.nn.export_lora(out, tmp_path / "lora", model)
    bank.remove()
    for load, folder in ((lortalib.nn.load, "own"), (lortalib.nn.load_lora, "lora")):
        adapter = load(model, tmp_path / folder, name=folder)
        torch.testing.assert_close(output(model, inputs), wanted, atol=3e-5, rtol=1e-4)
        adapter.remove()
    again = shared_bank(model, decomposition)
    again["ann"] = tmp_path / "own"
    again["bob"] = out
    torch.testing.assert_close(
        rows_of(model, again, ["ann", "bob"], inputs), wanted, atol=3e-5, rtol=1e-4
    )


def test_a_bank_is_filled_from_another_and_grows():
    model, inputs = small_llama(), prompts()
    small = shared_bank(model, capacity=1, alpha=0.5)
    small.fill(range(5), constant(small, 0.3, 5))
    small[1] = put(small_llama(), shared=small, seed=1)
    wanted = rows_of(model, small, [1, 3], inputs)
    small.remove()
    large = shared_bank(model, dtype=torch.float64)
    large.update(small)
    torch.testing.assert_close(rows_of(model, large, [1, 3], inputs), wanted)
    other = shared_bank(small_llama())
    other["x"] = put(small_llama(), seed=7)
    with pytest.raises(ValueError, match="other shared parameters"):
        large.update(other)
    assert "x" not in large


def test_shared_parameters_train_with_the_rows():
    model, inputs = small_llama().double(), prompts()
    bank = shared_bank(model, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    own = {
        name: [
            torch.randn(2, *t.shape, generator=draw, dtype=torch.float64).requires_grad_()
            for t in ts
        ]
        for name, ts in bank[None].items()
    }
    parameters = [*own["layers"], *(p.requires_grad_() for p in bank.shared["layers"])]
    optimiser = torch.optim.SGD(parameters, lr=0.01)
    model.requires_grad_(False)
    losses = []
    with bank.using_tensors(own):  # the pairs follow the parameters within one context
        for _ in range(3):
            loss = model(**inputs)[0].square().mean()
            optimiser.zero_grad()
            loss.backward()
            with torch.no_grad():  # a look between two steps sees what the last one left
                torch.testing.assert_close(model(**inputs)[0].square().mean(), loss)
            optimiser.step()
            losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    bank.fill(["ann", "bob"], own)
    with bank.using_tensors(own):
        torch.testing.assert_close(
            output(model, inputs), rows_of(model, bank, ["ann", "bob"], inputs)
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, inputs = small_llama().double(), prompts()
    bank = shared_bank(model, dtype=torch.float64)
    own = {
        name: [torch.ones(2, *t.shape, dtype=torch.float64) for t in ts]
        for name, ts in bank[None].items()
    }
    shared = [p.requires_grad_() for p in bank.shared["layers"]]
    found = []
    for checkpoints in (False, True):
        model.train(checkpoints)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with bank.using_tensors(own):
            model(**inputs, use_cache=False)[0].square().sum().backward()
        found.append([p.grad.clone() for p in shared])
        for parameter in shared:
            parameter.grad = None
    torch.testing.assert_close(found[0], found[1])


def test_generation_is_that_of_each_adapter_alone():
    model = small_llama()
    bank = shared_bank(model, "indscal")
    bank.fill(range(4), random_stack(bank, 4))
    ids = prompts(3, 6)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for options in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
        with bank.using([1, None, 3]):
            found = model.generate(ids, attention_mask=mask, **options)
        copies = options.get("num_return_sequences", 1)
        for row, name in enumerate((1, None, 3)):
            one = slice(row, row + 1)
            with bank.using([name]):
                wanted = model.generate(ids[one], attention_mask=mask[one], **options)
            assert torch.equal(found[row * copies : (row + 1) * copies, : wanted.shape[1]], wanted)


def test_marks_in_the_line_do_what_the_argument_does():
    line = "in r (shared), out r (shared), head r, layer r, matrix r"
    by_line = lortalib.nn.bank(small_llama(), line, 2)
    assert by_line.count() == shared_bank(small_llama()).count() == 20
    assert [tuple(p.shape) for p in by_line.shared["layers"]] == [(16, 2), (8, 2)]
    assert "48 shared" in repr(by_line)
    with pytest.raises(ValueError, match="no parameter carries the leg 'width'"):
        lortalib.nn.bank(small_llama(), "cp", 2, shared=["width"])
    for wrong in ("in", 3, [3], by_line, None):
        with pytest.raises(
            ValueError, match=r"shared must list legs, such as \('in', 'out'\); found"
        ):
            lortalib.nn.bank(small_llama(), "cp", 2, shared=wrong)
    with pytest.raises(ValueError, match="so its adapters cannot differ"):
        lortalib.nn.bank(small_llama(), "lora", 2, shared=SIDES)


def test_adapters_without_shared_sides_cannot_be_built_on():
    model = small_llama()
    base = put(model, seed=1)
    with pytest.raises(ValueError, match=r"has no parameter marked \(shared\)"):
        lortalib.nn.apply(model, "cp", 2, shared=base, name="other")
    bank = shared_bank(model)
    with pytest.raises(ValueError, match="use the rank"):
        lortalib.nn.apply(model, "cp", 3, shared=bank, name="other")
    with pytest.raises(ValueError, match="Use its decomposition"):
        lortalib.nn.apply(model, "tucker", 2, shared=bank, name="other")
    assert list(lortalib.nn.adapters(model)) == ["default"]


def test_networks_of_one_stack_can_have_one_shared_side(tmp_path):
    model, inputs = FAMILIES["Llama"].model(), FAMILIES["Llama"].inputs()
    options = {"targets": "all", "share_residual": True}
    bank = shared_bank(model, **options)
    sides = {name: parameters[0] for name, parameters in bank.shared.items()}
    assert len(sides) > 1
    assert len({id(p) for p in sides.values()}) == 1
    source = put(FAMILIES["Llama"].model(), seed=1, **options)
    bank["x"] = source
    lone = put(model, seed=1, **options)
    wanted = output(model, inputs)
    lone.remove()
    assert close(rows_of(model, bank, ["x", "x"], inputs), wanted, 1e-4)
    again = bank.adapter("x")
    found, wanted = again.networks.state_dict(), source.networks.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    again.save(tmp_path, model=model)
    bank["y"] = tmp_path


def test_an_adapter_of_llama_3_8b_has_two_kilobytes():
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    bank = shared_bank(model, "cp", 16, dtype=torch.bfloat16, device="cpu", capacity=10)
    bank.fill(range(10), constant(bank, 1, 10))
    assert bank.nbytes / len(bank) == 2 * 16 * (32 + 32 + 4) == 2176


def test_copies_and_threads():
    model, inputs = small_llama(), prompts()
    bank = shared_bank(model)
    bank.fill(range(2), random_stack(bank, 2))
    wanted = {k: rows_of(model, bank, [k, k], inputs) for k in range(2)}
    other_model, other = copy.deepcopy((model, bank))
    for parameter in bank.shared["layers"]:
        parameter.zero_()
    torch.testing.assert_close(rows_of(other_model, other, [0, 1], inputs)[1], wanted[1][1])
    wrong = []

    def work(k):
        for _ in range(10):
            if not close(rows_of(other_model, other, [k, k], inputs), wanted[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("packed", [False, True])
def test_transforms_and_traces_leave_nothing_in_a_context(packed):
    model, inputs = small_llama().double(), prompts()
    bank = shared_bank(model, "tucker", dtype=torch.float64)
    bank.fill([1], random_stack(bank, 1))
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    names = [[1] * 5, [None] * 5] if packed else [1, None]

    def loss(embedded):
        return model(inputs_embeds=embedded)[0].square().sum()

    wanted = rows_of(model, bank, names, inputs)
    with bank.using(names):
        found = torch.func.grad(loss)(embedded)
        loss(embedded.requires_grad_()).backward()
        torch.testing.assert_close(found, embedded.grad, rtol=1e-4, atol=1e-4)
        with FakeTensorMode(allow_non_fake_inputs=True):
            output(model, inputs)
        torch.testing.assert_close(output(model, inputs), wanted)


def test_a_running_context_keeps_its_shared_sides_when_the_bank_gets_others():
    model, inputs = small_llama(), prompts()
    bank = shared_bank(model)
    bank["a"] = put(small_llama(), seed=1)
    other = put(small_llama(), seed=2)
    wanted = rows_of(model, bank, ["a", None], inputs)
    with bank.using(["a", None]):
        del bank["a"]
        bank["c"] = other
        assert torch.equal(output(model, inputs), wanted)


@pytest.mark.parametrize("of", ["bank", "adapter"])
def test_shared_parameters_are_not_rounded(of):
    model = small_llama()
    base = shared_bank(model) if of == "bank" else put(small_llama(), shared=SIDES)
    with pytest.raises(
        ValueError, match=r"dtype=torch.bfloat16 would round .* use dtype=torch.float32"
    ):
        lortalib.nn.apply(model, "cp", 2, shared=base, dtype=torch.bfloat16)
    assert not lortalib.nn.adapters(model)
    wide = lortalib.nn.apply(model, "cp", 2, shared=base, dtype=torch.float64)
    bank = shared_bank(small_llama())
    bank.update({"ann": base if of == "adapter" else wide})
    bank["eve"] = wide
    with pytest.raises(ValueError, match=r"in group 'layers' rounded to torch.bfloat16"):
        bank["bob"] = wide.bfloat16()
