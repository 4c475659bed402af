"""Files of banks: what is saved comes back, and damage is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from banks import equal_tensors, prompts, random_stack, rows_of, small_llama
from safetensors import safe_open
from safetensors.torch import save_file

import lortalib
from lortalib.nn import AdapterFileError
from lortalib.nn._files import digest

SHARED = {"own sides": (), "shared sides": ("in", "out")}
each_sharing = pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)


def full(model, shared, decomposition="cp", **options):
    bank = lortalib.nn.bank(model, decomposition, 2, shared=shared, **options)
    bank.fill(["ann", 3, "eve"], random_stack(bank, 3))
    return bank


@each_sharing
@pytest.mark.parametrize("decomposition", ["cp", "indscal", "uni_lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_comes_back(tmp_path, shared, decomposition, dtype):
    if decomposition == "uni_lora":
        shared = ()  # its parameters have one vector
    model, inputs = small_llama(), prompts()
    options = {"decomposition": decomposition, "dtype": dtype, "alpha": 0.5}
    bank = lortalib.nn.bank(model, rank=2, shared=shared, **options)
    stack = {
        n: [t[:1].expand(3, *t.shape[1:]) for t in ts] for n, ts in random_stack(bank, 1).items()
    }
    if decomposition == "uni_lora":
        stack = {n: [ts[0]] * len(ts) for n, ts in stack.items()}
    bank.fill(["ann", 3, "eve"], stack)
    wanted = rows_of(model, bank, [3, "ann"], inputs)
    folder = bank.save(tmp_path / "bank")
    bank.remove()
    again = lortalib.nn.bank(model, rank=2, shared=shared, **{**options, "capacity": 1})
    again.load(folder)
    assert list(again) == ["ann", 3, "eve"]
    assert torch.equal(rows_of(model, again, [3, "ann"], inputs), wanted)
    other = lortalib.nn.bank(
        model, rank=2, shared=shared, **{**options, "alpha": 2.0, "dtype": torch.float32}
    )
    other.load(folder)
    again.remove()
    torch.testing.assert_close(
        rows_of(model, other, [3, "ann"], inputs), wanted, atol=1e-4, rtol=1e-3
    )


@each_sharing
def test_an_empty_bank_can_be_saved(tmp_path, shared):
    bank = lortalib.nn.bank(small_llama(), "cp", 2, shared=shared)
    again = full(small_llama(), shared)
    before = {name: again[name]["layers"] for name in again}
    again.load(bank.save(tmp_path))
    assert list(again) == list(before) == ["ann", 3, "eve"]
    for name, tensors in before.items():
        assert all(map(torch.equal, again[name]["layers"], tensors))


def test_damage_and_other_shapes_are_refused_and_nothing_changes(tmp_path):
    model, sides = small_llama(), ("in", "out")
    bank = full(model, sides)
    folder = bank.save(tmp_path / "one")
    before = {name: bank[name] for name in bank}
    other = full(small_llama(), sides)
    other.shared["layers"][0].add_(1)
    second = other.save(tmp_path / "two")
    with pytest.raises(ValueError, match="other shared parameters"):
        bank.load(second)
    (second / "bank.safetensors").write_bytes((folder / "bank.safetensors").read_bytes())
    with pytest.raises(AdapterFileError, match="not written together"):
        bank.load(second)
    data = bytearray((folder / "bank.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "bank.safetensors").write_bytes(data)
    with pytest.raises(AdapterFileError, match="is damaged"):
        bank.load(folder)
    (folder / "bank.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        bank.load(folder)
    wider = lortalib.nn.bank(small_llama(), "cp", 3, shared=sides)
    with pytest.raises(ValueError, match="shape"):
        wider.load(other.save(tmp_path / "three"))
    assert len(wider) == 0
    assert list(bank) == list(before)
    assert all(equal_tensors(before[name], bank[name]) for name in before)


def test_names_that_no_file_holds_are_refused(tmp_path):
    bank = full(small_llama(), ())
    bank["ann", 1] = bank["ann"]
    with pytest.raises(ValueError, match=r"found \('ann', 1\)"):
        bank.save(tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_a_save_that_fails_leaves_the_bank_that_was_there(tmp_path, monkeypatch):
    bank = full(small_llama(), ("in", "out"))
    folder = bank.save(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = full(small_llama(), ("in", "out"))
    other.shared["layers"][0].add_(1)

    def failing(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr("lortalib.nn._bank.file.write_tensors", failing)
    with pytest.raises(OSError, match="full"):
        other.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_bank_that_shares_other_parameters_is_refused(tmp_path):
    line = "in r, out r, layer matrix r"
    one, other = (
        lortalib.nn.bank(small_llama(), line, 4, shared=(leg,), acts_on="stream")
        for leg in ("in", "out")
    )
    one.fill(["ann"], random_stack(one, 1))
    for call in (lambda: other.load(one.save(tmp_path)), lambda: other.update(one)):
        with pytest.raises(
            ValueError, match=r"in r \(shared\), out r.*\n.*\n *in r, out r \(shared"
        ):
            call()
    assert len(other) == 0


def test_folders_of_banks_and_of_adapters_are_told_apart(tmp_path):
    bank = full(small_llama(), ())
    one = bank.save(tmp_path / "bank")
    other = bank.adapter("ann").save(tmp_path / "adapter", model=small_llama())
    for call in (
        lambda: bank.add("x", one),
        lambda: bank.add("x", one / "adapter.safetensors"),
        lambda: lortalib.nn.load(small_llama(), one),
        lambda: lortalib.nn.read(one),
        lambda: lortalib.nn.convert(one, tmp_path / "converted"),
        lambda: lortalib.nn.compress(small_llama(), one, "cp", 2),
        lambda: bank.adapter("ann").save(one, model=small_llama()),
    ):
        with pytest.raises(AdapterFileError, match=r"is the folder of a bank.*bank\.load"):
            call()
    with pytest.raises(FileNotFoundError, match=r"no bank.*bank\[name\] = folder"):
        bank.load(other)
    bank.load(one)
    bank["x"] = other


def test_an_empty_bank_keeps_its_shared_sides(tmp_path):
    bank, *others = (lortalib.nn.bank(small_llama(), "cp", 2, shared=("in", "out")) for _ in "abc")
    bank.shared["layers"][0].add_(1)
    others[0].load(bank.save(tmp_path))
    others[1].update(bank)
    for other in others:
        assert all(map(torch.equal, bank.shared["layers"], other.shared["layers"]))


@pytest.mark.parametrize("names", ['["ann", "ann"]', '[["ann"], 3]', '"an"', "[", "[1.5, 2]"])
def test_odd_names_in_a_file_are_refused(tmp_path, monkeypatch, names):
    bank = full(small_llama(), ())
    del bank[3]

    def odd(found):
        return names if found == ["ann", "eve"] else json.dumps(found)

    monkeypatch.setattr("lortalib.nn._bank.file.json", SimpleNamespace(dumps=odd, loads=json.loads))
    bank.save(tmp_path)
    with pytest.raises(AdapterFileError, match="a list of distinct texts or integers; found"):
        bank.load(tmp_path)


@pytest.mark.parametrize("share_residual", [False, True])
@pytest.mark.parametrize("decomposition", ["indscal", "cp", "uni_lora"])
def test_a_parameter_of_several_places_is_written_once(tmp_path, decomposition, share_residual):
    options = {"targets": "all", "share_residual": share_residual}
    bank = lortalib.nn.bank(small_llama(), decomposition, 2, **options)
    source = lortalib.nn.apply(small_llama(), decomposition, 2, init="normal", **options)
    bank.update({"ann": source, "eve": source})
    file = bank.save(tmp_path) / "bank.safetensors"
    with safe_open(file, "pt") as opened:
        written = [opened.get_tensor(name) for name in opened.keys() if name != "names"]  # noqa: SIM118
    assert sum(tensor.numel() for tensor in written) == 2 * bank.count()
    again = lortalib.nn.bank(small_llama(), decomposition, 2, **options)
    again.load(tmp_path)
    assert all(equal_tensors(bank[name], again[name]) for name in ("ann", "eve"))


def test_a_file_that_has_a_parameter_twice_is_read(tmp_path):
    """Earlier versions wrote a tied parameter for each of its places."""
    bank = full_of_one(small_llama(), "indscal")
    path = bank.save(tmp_path) / "bank.safetensors"
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors["layers.1"] = tensors["layers.0"].clone()
    metadata["sha256"] = digest(metadata["adapter"], tensors)
    save_file(tensors, path, metadata)
    again = lortalib.nn.bank(small_llama(), "indscal", 2)
    again.load(tmp_path)
    assert equal_tensors(bank["ann"], again["ann"])


def full_of_one(model, decomposition):
    bank = lortalib.nn.bank(model, decomposition, 2)
    bank["ann"] = lortalib.nn.apply(small_llama(), decomposition, 2, init="normal")
    return bank


def test_a_file_without_one_of_its_tensors_is_refused(tmp_path):
    path = full(small_llama(), ()).save(tmp_path) / "bank.safetensors"
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    del tensors["layers.1"]
    metadata["sha256"] = digest(metadata["adapter"], tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(AdapterFileError, match=r"lacks the tensor 'layers\.1'"):
        full(small_llama(), ()).load(tmp_path)
