"""Saving that fails, is interrupted or killed, or is read beside: the old file or the new one, never both."""

import importlib
import os
import pkgutil
import signal
import time
from contextlib import suppress
from random import Random

import pytest
import torch
import torch.distributed as dist
from adapted import close, output, put, unchanged
from models import FAMILIES
from saved_files import FILE, stops
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lortalib.nn import AdapterFileError, load, load_lora, read
from lortalib.nn._files.lora_file import open_lora

# Saving that fails


class Stop(BaseException):
    """An interrupt, as Ctrl-C is one."""


STEPS = [
    "os.replace",
    "os.fsync",
    "os.open",
    "pathlib.Path.open",
    "pathlib.Path.mkdir",
    "pathlib.Path.glob",
    "lortalib.nn._files.folder.remove_old_description",
    "lortalib.nn._files.saved.write_tensors",
    "lortalib.nn._files.saved.digest",
    "shutil.rmtree",
]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("place", STEPS)
def test_a_save_that_stops_leaves_the_old_or_the_new(
    llama, tmp_path, monkeypatch, place, calls, behind, error
):
    adapter = put(llama)
    adapter.save(tmp_path)
    old = (tmp_path / FILE).read_bytes()
    with torch.no_grad():
        next(adapter.parameters()).neg_()
    adapter.save(tmp_path / "new")
    new = (tmp_path / "new" / FILE).read_bytes()
    if place.endswith("remove_old_description"):
        place = "lortalib.nn._files.adapter.remove_old_description"
    with monkeypatch.context() as patched, unchanged(llama):
        patched.setattr(place, stops(pkgutil.resolve_name(place), calls, behind, error))
        with suppress(error):
            adapter.save(tmp_path)
    assert (tmp_path / FILE).read_bytes() in (old, new)
    assert read(tmp_path).count() == adapter.count()
    left = {name for name in os.listdir(tmp_path) if not name.startswith(".saving-")}
    assert left == {FILE, "new"}
    if place not in ("shutil.rmtree", "os.open"):  # what clears up: the next save does it
        assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("step", ["write_tensors", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(llama, tmp_path, monkeypatch, step):
    """Before the rename, no step may leave the new file."""
    adapter = put(llama)
    adapter.save(tmp_path)
    old = (tmp_path / FILE).read_bytes()
    with torch.no_grad():
        next(adapter.parameters()).neg_()
    place = "lortalib.nn._files.saved.write_tensors" if step == "write_tensors" else f"os.{step}"
    with monkeypatch.context() as patched, unchanged(llama):
        patched.setattr(place, stops(pkgutil.resolve_name(place), 0, False, OSError))
        with pytest.raises(OSError, match="no space left"):
            adapter.save(tmp_path)
    assert os.listdir(tmp_path) == [FILE]
    assert (tmp_path / FILE).read_bytes() == old


def test_what_killed_saves_left_is_removed(llama, tmp_path):
    adapter = put(llama)
    adapter.save(tmp_path)
    old, young = tmp_path / ".saving-old", tmp_path / ".saving-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / FILE).write_text("half")
    loose = tmp_path / ".saving-file"
    loose.write_text("half")
    for path in (old, loose):
        os.utime(path, (1, 1))
    adapter.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".saving-young", FILE]


def one_or_two(llama):
    """Two adapters whose every number says which of the two it is of."""
    found = []
    for k in (1, 2):
        adapter = put(llama, name=f"n{k}", alpha=float(k))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.fill_(k)
        found.append(adapter)
    return found


def whole(adapter):
    """Whether name, alpha and numbers are of one save."""
    k = adapter.config.alpha
    return adapter.name == f"n{k:.0f}" and all((p == k).all() for p in adapter.parameters())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_leaves_one_of_the_two(llama, tmp_path):
    one, two = one_or_two(llama)
    one.save(tmp_path)
    random = Random(0)
    for _ in range(12):
        pid = os.fork()
        if pid == 0:
            while True:
                two.save(tmp_path)
                one.save(tmp_path)
        time.sleep(0.02 + 0.03 * random.random())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert whole(read(tmp_path))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_reader_beside_a_writer_sees_the_old_or_the_new(llama, tmp_path):
    one, two = one_or_two(llama)
    one.save(tmp_path)
    pid = os.fork()
    if pid == 0:
        while True:
            two.save(tmp_path)
            one.save(tmp_path)
    try:
        loads, seen, end = 0, set(), time.monotonic() + 60
        while loads < 100 or (len(seen) < 2 and time.monotonic() < end):
            found = read(tmp_path)
            assert whole(found)
            loads, seen = loads + 1, seen | {found.name}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert seen == {"n1", "n2"}


def test_saving_onto_a_file_or_from_the_meta_device(llama, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OSError, match="taken"):
        put(llama).save(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
    with torch.device("meta"):
        on_meta = FAMILIES["Llama"].model()
    with pytest.raises(ValueError, match="on the meta device: it has no numbers to save"):
        put(on_meta).save(tmp_path / "meta")
    assert not (tmp_path / "meta").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["a factor", "a trained module"])
def test_what_no_reader_takes_is_not_written(where, value, llama, tmp_path):
    adapter = put(llama, train_also=["lm_head"])
    adapter.save(tmp_path)
    old = (tmp_path / FILE).read_bytes()
    factor, name = adapter.networks["layers"].in_r, "networks.layers.in_r"
    if where == "a trained module":
        factor, name = llama.lm_head.weight, "trained_modules.lm_head:weight"
    with torch.no_grad():
        factor.view(-1)[3] = value
    message = f"'{name}' holds NaN or infinity, so adapter 'default' was not saved; nothing"
    with unchanged(llama), pytest.raises(ValueError, match=message):
        adapter.save(tmp_path)
    assert (tmp_path / FILE).read_bytes() == old


def test_what_no_file_holds_is_refused_by_name(llama, tmp_path):
    adapter = put(llama, "cp")
    adapter.networks["layers"].in_r.data = adapter.networks["layers"].in_r.data.half()
    with pytest.raises(ValueError, match="'layers' are of different types"):
        adapter.save(tmp_path)
    adapter.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="float8_e4m3fn, which an adapter's file does not hold"):
        adapter.save(tmp_path)
    assert os.listdir(tmp_path) == []


# An export that is interrupted

EXPORT_STEPS = ["os.replace", "os.fsync", "os.link", "lortalib.nn._files.export_lora.write_tensors"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("place", EXPORT_STEPS)
def test_an_export_that_stops_leaves_the_old_or_the_new(
    llama, tmp_path, monkeypatch, place, calls, behind, error
):
    def files(folder):
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    put(llama, "cp", 2).export_lora(tmp_path)
    adapter = put(llama, "cp", 3, name="new")
    adapter.export_lora(tmp_path / "new")
    old, new = files(tmp_path), files(tmp_path / "new")
    path, _, name = place.rpartition(".")
    module = importlib.import_module(path)
    with monkeypatch.context() as patched, unchanged(llama):
        patched.setattr(module, name, stops(getattr(module, name), calls, behind, error))
        with suppress(error):
            adapter.export_lora(tmp_path)
    assert files(tmp_path) in (old, new)
    with open_lora(tmp_path) as opened:
        opened.read()
    assert sorted(os.listdir(tmp_path)) == [*sorted(old), "new"]


def test_files_of_two_exports_are_told_apart(llama, tmp_path):
    """What a process that is killed between the two renames leaves."""
    put(llama, "cp", 2).export_lora(tmp_path / "one")
    put(llama, "cp", 3, name="b").export_lora(tmp_path / "two")
    config = (tmp_path / "one" / "adapter_config.json").read_bytes()
    (tmp_path / "two" / "adapter_config.json").write_bytes(config)
    other = FAMILIES["Llama"].model("ForCausalLM")
    with unchanged(other), pytest.raises(AdapterFileError, match="of two exports, or edited"):
        load_lora(other, tmp_path / "two")


# Factors that are divided over processes


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_an_adapter_of_a_sharded_model_is_saved_whole(llama, inputs, one_process, tmp_path):
    adapter = put(llama, share_residual=True, train_also=["lm_head"])
    expected = output(llama, inputs)
    for layer in llama.model.layers:
        fully_shard(layer, mesh=one_process)
    fully_shard(llama, mesh=one_process)
    assert all(isinstance(p, DTensor) for p in adapter.parameters())
    adapter.save(tmp_path / "own")
    adapter.export_lora(tmp_path / "lora")
    for kind, get in (("own", load), ("lora", load_lora)):
        other = FAMILIES["Llama"].model("ForCausalLM")
        get(other, tmp_path / kind)
        assert close(output(other, inputs), expected)
