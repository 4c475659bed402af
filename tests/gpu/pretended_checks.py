"""What holds on the pretended accelerator; `test_pretended` runs this file in a process of its own.

The numbers are those of the CPU, no operation has tensors of two devices, and no forward or backward
does what would make Python wait for a GPU.
"""

import copy
from argparse import Namespace

import peft
import pytest
import torch
from accelerate import dispatch_model
from device_cases import (
    KINDS,
    adapter_of,
    close,
    llama,
    on,
    output,
    randomise,
    same_bits,
    step,
    step_inputs,
)
from pretended import DEVICE, NAME, FarTensor, Waits, no_waiting
from pretended_cuda import Graph, pretend_cuda

import lortalib
from lortalib.peft import LortaConfig

each_kind = pytest.mark.parametrize("kind", KINDS)


def near(tensor):
    return tensor.near if isinstance(tensor, FarTensor) else tensor


def far(model):
    """A copy on the pretended device."""
    return copy.deepcopy(model).to(DEVICE)


@pytest.mark.parametrize(
    "how", ["plain", "kept pairs", "checkpoints", "reentrant checkpoints", "dropout"]
)
@each_kind
def test_a_step_waits_for_nothing_and_has_the_numbers_of_the_cpu(kind, how):
    model = llama()
    on(model, kind, dropout=0.1 if how == "dropout" else 0.0)
    other = far(model)
    if how != "plain":
        for each in (model, other):
            each.train()
    given, on_cpu = step_inputs(DEVICE, other), step_inputs("cpu", model)
    if how.endswith("checkpoints"):  # a reentrant one has a backward for each layer by itself
        kind_of = {"use_reentrant": how.startswith("reentrant"), "preserve_rng_state": False}
        for each, its in ((model, on_cpu), (other, given)):
            each.gradient_checkpointing_enable(kind_of)
            its["inputs_embeds"].requires_grad_()
    expected = step(model, on_cpu)
    found = step(other, given)  # constants of the contraction reach the device once
    if how != "dropout":
        assert same_bits(near(found), expected)
        for own, theirs in zip(adapter_of(model).parameters(), adapter_of(other).parameters()):
            if own.grad is not None:
                assert theirs.grad.device.type == NAME
                assert close(near(theirs.grad), own.grad, 1e-6)
    adapter = adapter_of(other)
    with adapter.keep_pairs() if how == "kept pairs" else no_waiting(), no_waiting():
        step(other, given)
        step(other, given)


@each_kind
def test_a_decoded_token_waits_for_nothing(kind):
    model = llama()
    on(model, kind)
    model = far(model)
    given = step_inputs(DEVICE, model)
    output(model, given)
    with no_waiting():
        output(model, given)
        with adapter_of(model).keep_pairs():
            output(model, given)


@each_kind
def test_a_life_on_the_device(kind, tmp_path):
    plain = llama()
    base = far(plain)
    model = far(plain)
    adapter = on(model, kind)
    assert all(p.device.type == NAME for p in adapter.parameters())
    given = step_inputs(DEVICE, model)
    step(model, given)
    optimizer = torch.optim.AdamW(lortalib.nn.parameter_groups(adapter, 1e-3), foreach=False)
    optimizer.step()
    trained = near(output(model, given))
    adapter.save(tmp_path / "own")
    adapter.export_lora(tmp_path / "lora")
    with torch.no_grad():
        adapter.merge()
        assert close(near(output(model, given)), trained)
        adapter.unmerge()
        for name, weight in base.named_parameters():
            assert same_bits(near(weight), near(model.get_parameter(name)))
        for load, folder in ((lortalib.nn.load, "own"), (lortalib.nn.load_lora, "lora")):
            other = far(plain)
            loaded = load(other, tmp_path / folder)
            assert all(p.device.type == NAME for p in loaded.parameters())
            assert close(near(output(other, given)), trained)


def test_an_adapter_is_aligned_on_the_device():
    model = far(llama())
    adapter = lortalib.nn.apply(model, "lora_xs", 4)
    given = step_inputs(DEVICE, model)
    lortalib.nn.align_to_gradient(
        model, [given], loss=lambda batch: model(**batch).logits.square().mean()
    )
    assert adapter.config.init == "gradient"
    assert all(p.device.type == NAME for p in adapter.parameters())


@each_kind
def test_a_graph_of_the_step_before_is_gone_when_the_next_is_recorded(kind):
    """Where a node that collects gradients outlives its step, a CUDA graph of the next cannot be captured."""
    model = llama()
    on(model, kind)
    model = far(model)
    trained = [p for p in adapter_of(model).parameters() if p.requires_grad]
    given = step_inputs(DEVICE, model)

    def nodes():
        return [p.view_as(p).grad_fn.next_functions[0][0] for p in trained]

    first = model(**given).logits
    for node in nodes():
        node.metadata["of the first step"] = True
    assert all(node.metadata for node in nodes())
    first.square().mean().backward()
    del first, node
    second = model(**given).logits
    assert not any(node.metadata for node in nodes())
    second.square().mean().backward()


@pytest.mark.parametrize("store", ["cpu", NAME])
def test_rows_of_a_bank_wait_for_nothing(store):
    plain = llama()
    model = far(plain)
    bank = lortalib.nn.bank(model, "cp", 2, device=store)
    expected = []
    for k, name in enumerate(["ann", "bob"]):
        one = copy.deepcopy(plain)
        adapter = on(one, "cp")
        randomise(adapter.parameters(), seed=k)
        bank[name] = adapter
        expected.append(output(one, step_inputs("cpu", one))[k])
    given = step_inputs(DEVICE, model)
    with bank.using(["ann", "bob"]):
        found = near(output(model, given))
        with no_waiting():
            output(model, given)
    for k in range(2):
        assert close(found[k], expected[k], 1e-5)


def wrapped():
    """A model with two adapters, by PEFT."""
    model = peft.get_peft_model(far(llama()), LortaConfig(rank=2), adapter_name="ann")
    model.add_adapter("bob", LortaConfig(rank=2))
    randomise(p for p in model.parameters() if p.requires_grad)
    return model.eval()


def test_a_step_through_peft_waits_for_nothing():
    model = wrapped()
    given = step_inputs(DEVICE, model)
    step(model, given)
    with no_waiting():
        step(model, given)


def test_a_mixed_batch_of_peft_has_the_numbers_of_each_adapter():
    model = wrapped()
    given = step_inputs(DEVICE, model)
    mixed = near(output(model, {**given, "adapter_names": ["ann", "bob"]}))
    for k, name in enumerate(["ann", "bob"]):
        model.set_adapter(name)
        assert close(mixed[k], near(output(model, given))[k])


def test_a_mixed_batch_of_peft_waits_for_nothing():
    model = wrapped()
    given = {**step_inputs(DEVICE, model), "adapter_names": ["ann", "bob"]}
    output(model, given)
    with no_waiting():
        output(model, given)


@pytest.mark.parametrize("factors", ["before", "after"])
@each_kind
def test_a_model_over_two_devices(kind, factors):
    model = llama()
    expected_model = copy.deepcopy(model)
    expected_adapter = on(expected_model, kind)
    places = dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.rotary_emb"], f"{NAME}:0"
    ) | dict.fromkeys(["model.layers.1", "model.norm", "lm_head"], "cpu")
    if factors == "before":
        on(model, kind)
        places["lortalib"] = "cpu"
    model = dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert model.model.layers[0].self_attn.q_proj.weight.device.type == NAME
    if factors == "after":
        on(model, kind)
    found = step(model, step_inputs(DEVICE, model))
    expected = step(expected_model, step_inputs("cpu", expected_model))
    assert close(near(found), expected, 1e-5)
    for own, theirs in zip(expected_adapter.parameters(), adapter_of(model).parameters()):
        if own.grad is not None:
            assert close(near(theirs.grad), own.grad, 1e-5)


# The benchmark


def test_the_benchmark_takes_the_way_of_a_gpu(tmp_path, monkeypatch):
    """Every contender is timed in every cell, and what it captures as a graph waits for nothing."""
    import run

    pretend_cuda(monkeypatch)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    options = {"device": DEVICE, "size": "small", "minutes": 5, "only": "", "out": tmp_path}
    bench = run.Run(Namespace(**options))
    for cell in run.cells(small=True):
        if cell.mode != "eager" or cell.work == run.BANK:  # before its graph a work runs eagerly
            bench.measure(cell)
    assert [found for found in bench.results if {"not run", "failed"} & {*found}] == []
    assert {found["mode"] for found in bench.results} == {"eager", "CUDA graph", "compiled"}
    assert Graph.replays > 0
    text = (tmp_path / "results-pretended-1.md").read_text()
    assert "card Pretended 1" in text
    assert "tiny, decoding, CUDA graph, 2 x 16" in text


def test_a_work_that_waits_is_not_captured(monkeypatch):
    from clock import Work, as_graph

    pretend_cuda(monkeypatch)
    number = torch.ones((), device=DEVICE)
    with pytest.raises(Waits):
        as_graph(Work(lambda: number.item()))


# The device itself


def test_the_device_is_as_strict_as_a_gpu():
    one = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="same device"):
        one + torch.ones(3)
    with no_waiting():
        for wait in (
            lambda: one.sum().item(),
            lambda: bool(one.all()),
            lambda: torch.equal(one, one),
            lambda: one.cpu(),
            lambda: one[one > 0],
            lambda: torch.tensor([1, 2], device=DEVICE),
            lambda: torch.ones(3).to(DEVICE),
        ):
            with pytest.raises(Waits):
                wait()
        assert (one + 1).device == DEVICE
        assert torch.zeros(2, device=DEVICE).device == DEVICE
