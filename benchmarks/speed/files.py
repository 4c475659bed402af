"""How long do saving, loading, switching and exporting an adapter take, and in how much memory?

CP of rank 8 on q, k, v, o, of the real SmolLM2-135M and of Llama shapes whose weights are on the meta
device (an adapter and its files do not need them), beside a LoRA of PEFT of the same rank. Each shape
is measured in a process of its own; memory is the largest the process had, above what it had before
the adapter. PEFT has no meta device for its save and load, so it is measured on SmolLM2 alone.

    python benchmarks/speed/files.py   writes files.md and .json beside it, in 1 minute
    python benchmarks/speed/files.py --quick   SmolLM2 and 7B; writes runs/files-quick.md and .json
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import MIB, Progress, arguments, seconds, table, write
from scale import LLAMAS
from torch import nn

import lortalib

RANK = 8
REAL = "SmolLM2-135M"


def highest() -> int:
    """Most bytes of this process in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size(folder: str) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def shape(title: str) -> nn.Module:
    """The model, real or on the meta device."""
    if title == REAL:
        import subjects

        return subjects.load(REAL).eval()
    return next(llama for llama in LLAMAS if llama.title == title).build()


def ours(title: str) -> dict[str, Any]:
    """What lortalib takes on one shape."""
    model = shape(title)
    before = highest()
    adapter = lortalib.nn.apply(model, "cp", RANK)
    adapter.networks.to_empty(device="cpu")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    found: dict[str, Any] = {"parameters": adapter.count()}
    with tempfile.TemporaryDirectory() as folder:
        found["save"] = seconds(lambda: adapter.save(folder))
        found["bytes"] = size(folder)

        def load() -> None:
            lortalib.nn.load(model, folder, name="again").remove()

        found["load"] = seconds(load)
        lortalib.nn.load(model, folder, name="other", active=False)
        names = iter(["other", "default"] * 100)
        found["switch"] = seconds(lambda: lortalib.nn.set_active(model, next(names)), 50)
        found["memory"] = highest() - before
    with tempfile.TemporaryDirectory() as folder:
        found["export"] = seconds(lambda: adapter.export_lora(folder), 3)
        found["exported bytes"] = size(folder)
        found["memory of export"] = highest() - before
    return found


def theirs() -> dict[str, Any]:
    """What PEFT's LoRA takes on the real model."""
    import peft

    model = shape(REAL)
    before = highest()
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=names))
    found: dict[str, Any] = {"parameters": wrapped.get_nb_trainable_parameters()[0]}
    with tempfile.TemporaryDirectory() as folder:
        found["save"] = seconds(lambda: wrapped.save_pretrained(folder))
        found["bytes"] = size(folder)

        def load() -> None:
            wrapped.load_adapter(folder, adapter_name="again")
            wrapped.delete_adapter("again")

        found["load"] = seconds(load)
        wrapped.load_adapter(folder, adapter_name="other")
        order = iter(["other", "default"] * 100)
        found["switch"] = seconds(lambda: wrapped.set_adapter(next(order)), 50)
    found["memory"] = highest() - before
    return found


def in_a_process(title: str) -> dict[str, Any]:
    """The measurements of one row, made by a fresh process."""
    command = [sys.executable, __file__, "--only", title]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(title: str, found: dict[str, Any]) -> tuple[object, ...]:
    """One row of the table."""

    def milliseconds(key: str) -> str:
        return f"{found[key] * 1e3:,.2f}" if key in found else ""

    def mebibytes(key: str) -> str:
        return f"{found[key] / MIB:,.2f}" if key in found else ""

    return (
        title, f"{found['parameters']:,}", milliseconds("save"), milliseconds("load"),
        milliseconds("switch"), mebibytes("bytes"), milliseconds("export"),
        mebibytes("exported bytes"), mebibytes("memory of export"),
    )  # fmt: skip


def main() -> None:
    """Measure every shape and write the table."""
    if "--only" in sys.argv:
        title = sys.argv[-1]
        print(json.dumps(theirs() if title == "PEFT" else ours(title)))
        return
    options = arguments(__doc__, repetitions=1)
    progress = Progress()
    titles = [REAL, *(llama.title for llama in LLAMAS if not llama.title.startswith("8B"))]
    found = {}
    for title in titles[:2] if options.quick else titles:
        found[title] = in_a_process(title)
        progress.say(title)
    found[f"{REAL}, LoRA of PEFT"] = in_a_process("PEFT")
    head = (
        "model", "trainable parameters", "save, ms", "load, ms", "switch, ms", "file, MiB",
        "export as LoRA, ms", "exported, MiB", "memory of all, MiB",
    )  # fmt: skip
    parts = [
        f"CP of rank {RANK} on q, k, v, o; medians.",
        table(head, (row(title, entry) for title, entry in found.items())),
    ]
    write(__file__, parts, found, quick=options.quick)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
