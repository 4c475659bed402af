"""Processes that are killed while they write, and readers beside a writer: the old or the new, never both.

Long: ``LORTALIB_KILLS=500 LORTALIB_LOADS=1000`` for each writer (see docs/reliability.md).
"""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
import transformers
from adapted import put, same_bits
from models import FAMILIES
from safetensors.torch import load_file
from saved_files import FILE
from tqdm import tqdm

from lortalib.cli import main
from lortalib.nn import AdapterFileError, load_lora, read

KILLS = int(os.environ.get("LORTALIB_KILLS", "5"))
LOADS = int(os.environ.get("LORTALIB_LOADS", "40"))
LORA = ("adapter_config.json", "adapter_model.safetensors")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(autouse=True)
def no_lock_is_shared():
    """By default the lock of tqdm belongs to all processes: one that is killed may never give it back."""
    tqdm.set_lock(threading.RLock())
    transformers.logging.disable_progress_bar()


def llama():
    return FAMILIES["Llama"].model("ForCausalLM")


#: Adapters of which the writers write two in turn.
KINDS = {
    "weights": ("cp", {"targets": "all", "train_also": ["lm_head"]}),
    "stream": ("indscal", {"targets": "all", "acts_on": "stream"}),
}


@dataclass
class Writer:
    """Writes one of two things to a folder, in turn, and tells which is there.

    Attributes:
        acts: what writes the one and the other.
        whole: the contents of the folder's files after each of them.
    """

    folder: object
    acts: list
    names: tuple
    whole: list = field(default_factory=list)

    def __post_init__(self):
        for act in self.acts:
            act()
            self.whole.append(self.contents())

    def contents(self):
        return {name: (self.folder / name).read_bytes() for name in self.names}

    def forever(self):
        while True:
            for act in self.acts:
                act()

    def seconds(self):
        start = time.monotonic()
        for act in self.acts:
            act()
        return time.monotonic() - start


def start(work):
    """A process that works until it is killed; returns once it has begun."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            os.write(writer, b"!")
            work()
        finally:
            os._exit(1)  # nothing of the tests goes on in here
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    os.close(reader)
    return pid


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"


def kills(work, seconds, number=None):
    """Kill as many workers, each at a random moment of its first two rounds."""
    random = Random(0)
    for _ in range(KILLS if number is None else number):
        pid = start(work)
        time.sleep(2 * seconds * random.random())
        kill(pid)
        yield


def command(*arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*map(str, arguments)]) == 0


def two(kind):
    """Two adapters of different ranks, so that everything in their files differs."""
    decomposition, options = KINDS[kind]
    return [
        put(llama(), decomposition, 2 + k, alpha=1.0 + k, seed=k, name=f"n{k}", **options)
        for k in range(2)
    ]


def saver(kind, folder):
    acts = [lambda adapter=adapter: adapter.save(folder) for adapter in two(kind)]
    return Writer(folder, acts, (FILE,))


def exporter(kind, folder):
    acts = [lambda adapter=adapter: adapter.export_lora(folder) for adapter in two(kind)]
    return Writer(folder, acts, LORA)


def converter(kind, folder):
    """`lortalib export-lora`."""
    aside = folder.parent / "saved"
    aside.mkdir()
    acts = []
    model = ()
    if kind == "stream":
        llama().save_pretrained(aside / "model")
        model = ("--model", aside / "model")
    for k, adapter in enumerate(two(kind)):
        adapter.save(aside / str(k))
        acts.append(lambda k=k: command("export-lora", aside / str(k), folder, *model))
    return Writer(folder, acts, LORA)


WRITERS = {"save": saver, "export_lora": exporter, "lortalib export-lora": converter}


def judge(writer):
    """Which of the two is in the folder; "refused" where the library says that it is neither."""
    found = writer.contents()
    if found in writer.whole:
        return str(writer.whole.index(found))
    reading = read if writer.names == (FILE,) else lambda folder: load_lora(llama(), folder)
    try:
        reading(writer.folder)
    except AdapterFileError as error:
        if writer.names != LORA or "of two exports" not in str(error):
            raise
        return "refused"
    raise AssertionError("mixed: two halves are read as one")


def clean(writer):
    """What the killed ones left goes with the next save, once it is old."""
    for path in writer.folder.glob(".saving-*"):
        os.utime(path, (1, 1))
    writer.acts[0]()
    assert sorted(os.listdir(writer.folder)) == sorted(writer.names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITERS)
def test_killed_it_leaves_one_of_the_two(name, kind, tmp_path):
    """The two files of a LoRA take two renames: killed between them, the folder is refused, never mixed."""
    writer = WRITERS[name](kind, tmp_path / "out")
    counts = dict.fromkeys(("0", "1", "refused"), 0)
    left = 0
    for _ in kills(writer.forever, writer.seconds()):
        counts[judge(writer)] += 1
        left = max(left, len(os.listdir(writer.folder)) - len(writer.names))
    print(f"{name}, {kind}: {sum(counts.values())} kills, {counts}, {left} work folders at most")
    assert sum(counts.values()) == KILLS
    clean(writer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["save", "export_lora"])
def test_a_reader_beside_a_writer_sees_one_of_the_two(name, kind, tmp_path):
    writer = WRITERS[name](kind, tmp_path / "out")
    sums = []
    for act in writer.acts:
        act()
        sums.append(checksum(name, writer.folder))
    counts = dict.fromkeys(("0", "1", "refused"), 0)
    pid = start(writer.forever)
    try:
        end = time.monotonic() + 60 + LOADS
        while sum(counts.values()) < LOADS or not (counts["0"] and counts["1"]):
            assert time.monotonic() < end
            try:
                found = checksum(name, writer.folder)
            except AdapterFileError as error:
                if name == "save" or "of two exports" not in str(error):
                    raise
                counts["refused"] += 1
                continue
            assert found in sums, "mixed"
            counts[str(sums.index(found))] += 1
    finally:
        kill(pid)
    print(f"{name}, {kind}: {sum(counts.values())} loads beside a writer, {counts}")


def checksum(name, folder):
    """Scaling and all numbers of what is loaded."""
    adapter = read(folder) if name == "save" else load_lora(llama(), folder)
    numbers = [p.detach().double().sum().item() for p in adapter.networks.parameters()]
    return adapter.name if name == "save" else "", adapter.scaling, numbers


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_merge_leaves_no_model_or_the_whole_one(kind, tmp_path):
    llama().save_pretrained(tmp_path / "model")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    decomposition, options = KINDS[kind]
    put(model, decomposition, **options).save(tmp_path / "adapter")
    outs = tmp_path / "outs"
    outs.mkdir()

    def merge(number):
        command("merge", tmp_path / "model", tmp_path / "adapter", outs / number)

    began = time.monotonic()
    merge("reference")
    seconds = time.monotonic() - began
    whole = {file.name: file.read_bytes() for file in (outs / "reference").iterdir()}
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(outs / "reference" / "model.safetensors")
    assert not all(same_bits(before[name], after[name]) for name in before)
    complete = 0

    def forever():
        for number in range(10**6):
            merge(f"{os.getpid()}-{number}")

    for _ in kills(forever, seconds):
        for out in outs.iterdir():
            if out.name.startswith(".merging-") or out.name == "reference":
                continue
            assert {file.name: file.read_bytes() for file in out.iterdir()} == whole
            complete += 1
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
    print(f"lortalib merge, {kind}: {KILLS} kills, {complete} models, all whole")
    torch.testing.assert_close(load_file(tmp_path / "model" / "model.safetensors"), before)
