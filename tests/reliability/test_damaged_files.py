"""Damaged and hostile files before every reader: the right error, soon, and nothing changed.

What is damaged, and how, is drawn at random: bits and bytes, the length, the header of the tensors, any value
of a JSON text by another of any type, and tensors under other names, types and shapes with a right digest.
Long: ``LORTALIB_DAMAGED=20000`` files and ``LORTALIB_BITS=2000`` bits (see docs/reliability.md).
"""

import contextlib
import copy
import io
import os
import random
import shutil
import signal
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import peft
import pytest
import transformers
from adapted import output, put, unchanged
from banks import random_stack
from file_damage import LORA, apart, meant, raw
from models import FAMILIES, words
from safetensors.torch import load_file, save_file
from saved_files import FILE
from test_any_damage import flipped

from lortalib.cli import main
from lortalib.decomp import LegsError
from lortalib.nn import (
    AdapterFileError,
    UnsupportedModelError,
    bank,
    compress,
    convert,
    load,
    load_lora,
    read,
    read_description,
)
from lortalib.peft import LortaConfig

FILES = int(os.environ.get("LORTALIB_DAMAGED", "150"))
BITS = int(os.environ.get("LORTALIB_BITS", "100"))
SECONDS = 5
MEGABYTES = 100
#: What most readers may answer: the library's own errors, and that a file is missing.
OURS = (AdapterFileError, LegsError, UnsupportedModelError, FileNotFoundError)


def bert():
    return FAMILIES["Bert"].model("ForSequenceClassification", num_hidden_layers=1)


#: Of which adapters the files are.
SOURCES = {
    "cp": ("cp", 1, {"targets": "qo", "train_also": ["classifier"], "dropout": 0.5}),
    "tt": ("tt", 2, {"targets": "all", "share_residual": True}),
    "stream": ("indscal", 2, {"targets": "all", "acts_on": "stream"}),
    "tasks": ("metatt_41d", 2, {"tasks": ["a", "b"], "train_also": ["classifier"]}),
}

# What reads them


def reading(folder):
    assert repr(read(folder))


def describing(folder):
    read_description(folder)


def loading(folder, model, load=load):
    adapter = load(model, folder)
    try:
        assert repr(adapter)
        with adapter.using(adapter.tasks[0]) if adapter.tasks else contextlib.nullcontext():
            output(model.train(), words())
            output(model.eval(), words())
        adapter.save(folder / "again")
    finally:
        shutil.rmtree(folder / "again", ignore_errors=True)
        adapter.remove()


def banking(folder, model):
    stored = bank(model, "cp", 1, targets="qo", capacity=1)
    try:
        stored["x"] = folder
        with stored.using(["x"] * 2):
            output(model, words())
    finally:
        stored.remove()


def bank_loading(folder, model):
    stored = bank(model, "cp", 1, targets="qo", capacity=1, shared=("in",))
    try:
        stored.load(folder)
        with stored.using([next(iter(stored), None)] * 2):
            output(model, words())
    finally:
        stored.remove()


def converting(folder):
    """To PEFT's folder or back; of several tasks, one alone."""
    out = folder / "converted"
    try:
        tasks = read_description(folder)["tasks"]
        convert(folder, out, task=tasks[0] if tasks else None)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def compressing(folder, model):
    compress(model, {"one": folder, "two": folder}, "jd", 1, sweeps=2)


def opening(folder, model):
    loading(folder, model, load_lora)


def peft_loading(folder, model):
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    output(loaded, words())


def run(*arguments):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([*map(str, arguments)])
    if code:
        raise AdapterFileError(said.getvalue())


class Readers:
    """Every reader of a kind of folder, by name; those of the command line need the folder of a model."""

    def __init__(self, scratch):
        self.model, self.scratch = scratch / "model", scratch
        bert().save_pretrained(self.model)
        self.of = {
            "own": {
                "nn.read": reading,
                "nn.read_description": describing,
                "nn.load": loading,
                "bank.add": banking,
                "info": lambda folder: run("info", folder),
                "info --json": lambda folder: run("info", folder, "--json"),
                "check": lambda folder: run("check", folder),
                "check --model": lambda folder: run("check", folder, "--model", self.model),
                "export-lora": self.export,
                "merge": self.merge,
                "nn.convert": converting,
                "nn.compress": compressing,
            },
            "version 1": {
                "nn.read": reading,
                "nn.read_description": describing,
                "nn.load": loading,
                "info": lambda folder: run("info", folder),
            },
            "lora": {
                "nn.load_lora": opening,
                "nn.compress": compressing,
                "from-lora": self.from_lora,
            },
            "peft": {"from_pretrained": peft_loading, "nn.convert": converting, "nn.load": loading},
            "bank": {"bank.load": bank_loading},
            "tasks": {
                "nn.read": reading,
                "nn.read_description": describing,
                "nn.load": loading,
                "nn.convert": converting,
                "info": lambda folder: run("info", folder),
                "check --model": lambda folder: run("check", folder, "--model", self.model),
                "export-lora --task": self.export_task,
            },
        }

    def export(self, folder):
        run("export-lora", folder, self.scratch / "out", "--model", self.model)
        shutil.rmtree(self.scratch / "out")

    def export_task(self, folder):
        run("export-lora", folder, self.scratch / "out", "--model", self.model, "--task", "a")
        shutil.rmtree(self.scratch / "out")

    def from_lora(self, folder):
        run("from-lora", folder, self.scratch / "out", "--model", self.model)
        shutil.rmtree(self.scratch / "out")

    def merge(self, folder):
        run("merge", self.model, folder, self.scratch / "merged")
        shutil.rmtree(self.scratch / "merged")


NEEDS_MODEL = (loading, banking, bank_loading, compressing, opening, peft_loading)


class Trial:
    """One reader on one folder: how it ended, and what it cost."""

    def __init__(self, reader, model):
        self.reader, self.model, self.fault = reader, model, None

    def __call__(self, folder):
        arguments = [self.model] if self.reader in NEEDS_MODEL else []
        before = resident("VmRSS", reset=True)
        began, error = time.process_time(), None
        with unchanged(self.model), warnings.catch_warnings(), limit(30):
            warnings.simplefilter("ignore")
            try:
                self.reader(folder, *arguments)
            except Exception as caught:
                error = caught
        if isinstance(error, Hang) or time.process_time() - began > SECONDS:
            self.fault = "took too long"
        elif resident("VmHWM") - before > MEGABYTES * 1024:
            self.fault = "took too much memory"
        elif error is not None and not self.expects(error):
            self.fault = "".join(traceback.format_exception(error)[-3:])
        return "accepted" if error is None else "refused"

    def expects(self, error):
        """Whether this reader may answer so. Of PEFT's, only what is raised within the library is the
        library's to answer for."""
        if self.reader in (banking, bank_loading, compressing, converting):
            return isinstance(error, (ValueError, KeyError, FileNotFoundError))
        if self.reader is peft_loading:
            frames = traceback.extract_tb(error.__traceback__)
            ours = any("/lortalib/peft/" in frame.filename for frame in frames)
            return isinstance(error, (ValueError, TypeError)) or not ours
        return isinstance(error, OURS)


class Hang(Exception):
    """Says that a reader did not come back."""


@contextlib.contextmanager
def limit(seconds):
    def stop(*_):
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def resident(field, reset=False):
    """Kilobytes of memory in use now ("VmRSS") or at most since the last reset ("VmHWM"); 0 where the
    system does not tell."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        text = Path("/proc/self/status").read_text()
        return int(text.partition(field + ":")[2].split()[0])
    return 0


# The trials


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def readers(scratch):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return Readers(scratch)


@pytest.fixture(scope="module")
def folders(scratch):
    """The sound folders: kind and path of each."""
    found = []
    for name, (decomposition, rank, options) in SOURCES.items():
        model = bert()
        adapter = put(model, decomposition, rank, name=name, alpha=0.5, **options)
        kind = "tasks" if adapter.tasks else "own"
        found.append((kind, adapter.save(scratch / f"{kind}-{name}")))
        if adapter.tasks:
            continue
        adapter.export_lora(scratch / f"lora-{name}")
        found.append(("lora", scratch / f"lora-{name}"))
        plain = scratch / f"plain-{name}"  # as PEFT writes it, without a digest
        shutil.copytree(scratch / f"lora-{name}", plain)
        save_file(apart(load_file(plain / LORA)), plain / LORA, metadata={"format": "pt"})
        found.append(("lora", plain))
    for acts_on, decomposition in (("weights", "cp"), ("stream", "indscal")):
        config = LortaConfig(
            rank=2, decomposition=decomposition, acts_on=acts_on, target_modules=["query", "key"]
        )
        peft.get_peft_model(bert(), config).save_pretrained(scratch / f"peft-{acts_on}")
        found.append(("peft", scratch / f"peft-{acts_on}"))
    stored = bank(bert(), "cp", 1, targets="qo", shared=("in",))
    stored.fill(["x", "y", 3], random_stack(stored, 3))
    found.append(("bank", stored.save(scratch / "bank")))
    golden = Path(__file__).parents[1] / "golden"
    found.append(("version 1", golden / "adapter-v1"))
    return found


def test_every_sound_folder_is_read(folders, readers):
    """Or the trials below would say nothing."""
    for kind, folder in folders:
        for name, reader in readers.of[kind].items():
            if name == "bank.add" and folder.name != "own-cp":
                continue
            if name == "nn.convert" and folder.name == "own-tt":
                continue  # PEFT holds no factor that networks share
            if name in ("nn.load", "bank.add") and (kind == "version 1" or name == "bank.add"):
                continue  # of another model; or it trains a head, which a bank refuses
            trial = Trial(reader, bert())
            assert trial(folder) == "accepted", (name, folder.name)
            assert trial.fault is None, (name, folder.name, trial.fault)


def test_any_damage_before_any_reader(folders, readers, scratch):
    draw, outcomes, faults = random.Random(FILES), Counter(), []
    model = bert()
    work = scratch / "work"
    began = resident("VmRSS")
    for number in range(FILES):
        kind, sound = draw.choice(folders)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(sound, work)
        by_accident = draw.random() < 0.5
        how = raw(draw.choice(sorted(work.iterdir())), draw) if by_accident else meant(work, draw)
        for name in {draw.choice(list(readers.of[kind])), draw.choice(list(readers.of[kind]))}:
            trial = Trial(readers.of[kind][name], model)
            outcome = trial(work)
            outcomes[f"{kind} {name} {outcome}"] += 1
            if trial.fault:
                faults.append((number, kind, sound.name, how, name, trial.fault))
    print(f"{FILES} damaged files, {outcomes.total()} readings:")
    for name, count in sorted(outcomes.items()):
        print(f"  {name}: {count}")
    print(f"faults: {Counter(f'{name}: {why.splitlines()[-1][:120]}' for *_, name, why in faults)}")
    print(f"memory: {(resident('VmRSS') - began) / 1024:.0f} MB more at the end")
    assert not faults, f"{len(faults)}: " + "\n".join(str(fault) for fault in faults[:10])


@pytest.mark.parametrize("kind", ["own", "lora"])
def test_no_flipped_bit_is_accepted(kind, folders, readers, scratch):
    """Neither of an adapter's file nor of the weights of an exported LoRA."""
    name, file = ("nn.load", FILE) if kind == "own" else ("nn.load_lora", LORA)
    sources = [path for found, path in folders if found == kind and "plain" not in path.name]
    draw, model, accepted, work = random.Random(BITS), bert(), [], scratch / "bits"
    for number in range(BITS):
        sound = sources[number % len(sources)]
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(sound, work)
        data = (work / file).read_bytes()
        bit = draw.randrange(8 * len(data))
        (work / file).write_bytes(flipped(data, bit))
        trial = Trial(readers.of[kind][name], model)
        if trial(work) != "refused" or trial.fault:
            accepted.append((sound.name, bit, trial.fault))
    print(f"{kind}: {BITS} flipped bits, {len(accepted)} accepted")
    assert accepted == []
