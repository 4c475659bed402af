"""Banks that are made for an adapter, or for a bank that was saved."""

import pytest
import torch
from adapted import output, put
from banks import equal_tensors, prompts, random_stack, rows_of, small_llama

import lortalib
from lortalib.nn import AdapterFileError

LINES = ["cp", "tucker", "indscal", "uni_lora", "lora", "in r, head out r, layer matrix r"]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("way", ["folder", "adapter", "PEFT"])
def test_a_bank_like_an_adapter_holds_it(line, way, tmp_path):
    if way == "PEFT" and (line == "indscal" or " " in line):
        pytest.skip("PEFT's folder names a format on the weights")
    model, inputs = small_llama(), prompts()
    options = {"init": "lorta"} if line == "cp" else {}
    adapter = put(model, line, 2, seed=1, alpha=0.5, **options)
    if options:  # the published start is zero, and its scaling is not alpha
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter)
    wanted = output(model, inputs)
    source = adapter if way == "adapter" else adapter.save(tmp_path / "own")
    if way == "PEFT":
        source = lortalib.nn.convert(source, tmp_path / "theirs")
    adapter.remove()
    bank = lortalib.nn.bank_like(model, source, capacity=3)
    assert (len(bank), bank.capacity) == (0, 3)
    assert bank.alpha == adapter.config.scaling
    bank["ann"] = source
    torch.testing.assert_close(rows_of(model, bank, ["ann", "ann"], inputs), wanted)
    assert bank.count() == adapter.count()
    bank.remove()


def test_a_bank_like_an_adapter_takes_others_of_its_kind(tmp_path):
    model = small_llama()
    first, second, other = (
        put(model, "tucker", rank, seed=seed, name=str(seed)) for seed, rank in enumerate((2, 2, 3))
    )
    bank = lortalib.nn.bank_like(model, first)
    bank.update({"one": first, "two": second})
    with pytest.raises(ValueError, match="does not fit the bank"):
        bank["three"] = other
    assert list(bank) == ["one", "two"]


@pytest.mark.parametrize("shared", [(), ("in", "out")], ids=["own", "shared"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_bank_like_a_saved_bank_loads_it(shared, residual, tmp_path):
    model, inputs = small_llama(), prompts()
    options = {"targets": "all", "share_residual": residual, "alpha": 0.5}
    if residual and shared:
        pytest.skip("both share the parameter for in")
    bank = lortalib.nn.bank(model, "cp", 2, shared=shared, dtype=torch.bfloat16, **options)
    stack = random_stack(bank, 2)
    if residual:  # its groups have one parameter for in
        first = next(iter(stack.values()))[0]
        stack = {name: [first, *tensors[1:]] for name, tensors in stack.items()}
    bank.fill(["ann", 3], stack)
    wanted = rows_of(model, bank, ["ann", 3], inputs)
    folder = bank.save(tmp_path)
    bank.remove()
    again = lortalib.nn.bank_like(model, folder, dtype=torch.bfloat16)
    again.load(folder)
    assert list(again) == ["ann", 3]
    assert (again.count(), again.nbytes) == (bank.count(), bank.nbytes)
    assert equal_tensors(again["ann"], bank["ann"])
    assert torch.equal(rows_of(model, again, ["ann", 3], inputs), wanted)


def test_what_no_bank_can_be_like(tmp_path):
    model = small_llama()
    before = sum(len(module._forward_hooks) for module in model.modules())
    tasks = lortalib.nn.apply(model, "metatt_41d", 2, tasks=["films", "news"])
    folder = tasks.save(tmp_path / "tasks")
    tasks.remove()
    for source, error, why in (
        (folder, ValueError, "has the tasks 'films', 'news'.*take one"),
        (tasks, ValueError, "has the tasks"),
        (tmp_path / "none", FileNotFoundError, "no adapter.safetensors"),
        (7, TypeError, "source must be an Adapter, or the path"),
        ({}, TypeError, "source must be an Adapter, or the path"),
    ):
        with pytest.raises(error, match=why):
            lortalib.nn.bank_like(model, source)
    lortalib.nn.export_lora(tasks.task("news"), tmp_path / "lora")
    with pytest.raises((AdapterFileError, FileNotFoundError)):
        lortalib.nn.bank_like(model, tmp_path / "lora")
    adapter = put(model, "cp", 2)
    with pytest.raises(TypeError, match="go with a folder or repository"):
        lortalib.nn.bank_like(model, adapter, subfolder="one")
    with pytest.raises(ValueError, match="capacity"):
        lortalib.nn.bank_like(model, adapter, capacity=0)
    adapter.remove()
    assert sum(len(module._forward_hooks) for module in model.modules()) == before
