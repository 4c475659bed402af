"""Training, inference and serving on a GPU, beside PEFT and the frozen base.

    make gpu                                                  nine minutes on one GPU
    python benchmarks/gpu/run.py --device cpu --size small    the same code paths anywhere

It needs torch, transformers and peft, and no network: models are random. First the tests that are marked
``gpu`` run. Then one cell after the other is timed and written to results-<card>.jsonl at once, so a run
that is cut off keeps what it has; what did not fit into ``--minutes`` is listed as not run. The tables go
into results-<card>.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import cases
import peft
import torch
import transformers
from cases import CONTENDERS, FLOOR, LORA
from clock import Work, as_graph, in_turn, ratio, wait

import lortalib

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Cell = dict[str, Any]


class Run:
    """One run of the benchmark: its arguments, its clock and its results.

    Args:
        options: the arguments.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.small = options.size == "small"
        self.end = time.monotonic() + 60 * options.minutes
        self.only = options.only
        self.cells: list[Cell] = []
        self.folder = Path(options.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.about = describe(self.device)
        self.stem = "results-" + re.sub(r"\W+", "-", self.about["card"].lower()).strip("-")
        (self.folder / f"{self.stem}.jsonl").write_text("")

    def note(self, cell: Cell) -> None:
        """Keep a cell, on the disk too."""
        self.cells.append(cell)
        with (self.folder / f"{self.stem}.jsonl").open("a") as file:
            file.write(json.dumps(cell) + "\n")
        print(cell, flush=True)

    def measure(self, cell: Cell, works: Callable[[], Mapping[str, Work]], share: float) -> None:
        """Time the works of one cell, or note why not.

        Args:
            cell: what it is.
            works: makes the works, which are warm afterwards.
            share: the part of the time that is left that the rounds may take.
        """
        if self.only and self.only not in " ".join(map(str, cell.values())):
            return None
        left = self.end - time.monotonic()
        if left <= 0:
            return self.note({**cell, "not run": "no time was left"})
        try:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            ready = works()
            for work in ready.values():
                work()
            wait(self.device)
            rounds, repeats = (2, 1) if self.small else (9, 5)
            times = in_turn(ready, self.device, rounds, repeats, time.monotonic() + share * left)
            found: Cell = {
                "ms": {
                    name: round(sorted(each)[len(each) // 2], 4) for name, each in times.items()
                },
                "ratio": {name: round(ratio(times, name, FLOOR), 4) for name in times},
            }
            if self.device.type == "cuda":
                found["MiB"] = torch.cuda.max_memory_allocated() >> 20
            self.note({**cell, **found})
        except Exception as error:  # one cell that fails does not cost the others
            self.note({**cell, "not run": f"{type(error).__name__}: {str(error)[:300]}"})
        finally:
            torch.compiler.reset()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return None


def describe(device: torch.device) -> dict[str, str]:
    """The machine and the versions."""
    cuda = device.type == "cuda"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    return {
        "card": torch.cuda.get_device_name(device) if cuda else "cpu",
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "cuda": str(torch.version.cuda) if cuda else "none",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "lortalib": lortalib.__version__,
    }


def tested(device: torch.device) -> Cell:
    """Run the tests marked ``gpu``, and say how they ended."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    tail = ended.stdout.strip().splitlines()[-8:]
    return {"work": "tests", "device": device.type, "exit code": ended.returncode, "end": tail}


WORKS: dict[str, Callable[[torch.nn.Module, torch.Tensor], Work]] = {
    "training step": cases.training,
    "prefill": cases.prefill,
    "decoding": cases.decoding,
    "decoding, pairs made anew": partial(cases.decoding, keep_pairs=False),
}


#: Compiling costs most of the time there is, so fewer are compiled.
COMPILED = (FLOOR, "lortalib CP r8", LORA)


def modes(device: torch.device, shape: str, wanted: list[str]) -> Iterator[str]:
    """How the works are run, the cheapest first; the largest model is not compiled."""
    if "eager" in wanted:
        yield "eager"
    if "graph" in wanted and device.type == "cuda":
        yield "CUDA graph"
    if "compiled" in wanted and shape != "7B":
        yield "compiled"


def prepared(base: torch.nn.Module, ids: torch.Tensor, work: str, mode: str) -> dict[str, Work]:
    """One work of every contender, ready to be timed."""
    found = {}
    for name, attach in CONTENDERS.items():
        if mode == "compiled" and name not in COMPILED:
            continue
        model = attach(cases.twin(base))
        if mode == "compiled":
            model.forward = torch.compile(model.forward, dynamic=False)  # type: ignore[method-assign]
        run = WORKS[work](model, ids)
        run()
        found[name] = as_graph(run) if mode == "CUDA graph" else run
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing begins")
    parser.add_argument("--only", default="", help="only cells that hold this text")
    parser.add_argument("--modes", nargs="+", default=["eager", "graph", "compiled"])
    parser.add_argument("--out", default=str(HERE), help="folder of the tables")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no GPU is here; try --device cpu --size small")
    run = Run(options)
    if not options.no_tests:
        run.note(tested(run.device))
    for shape in ("tiny",) if run.small else ("1B", "7B"):
        dtype = torch.float32 if run.device.type == "cpu" else torch.bfloat16
        base = cases.llama(shape, run.device, dtype)
        words = base.get_input_embeddings().num_embeddings
        rows, length = (2, 16) if run.small else ((8, 512) if shape == "1B" else (2, 512))
        ids = torch.randint(words, (rows, length), device=run.device)
        for mode in modes(run.device, shape, options.modes):
            for work in WORKS:
                cell = {"model": shape, "work": work, "mode": mode, "rows": rows, "tokens": length}
                run.measure(cell, partial(prepared, base, ids, work, mode), 0.1)
        many = 4 if run.small else 64
        users = ids[:1, :16].repeat(many, 1)
        cell = {"model": shape, "work": "rows", "mode": "eager", "rows": many, "tokens": 16}
        run.measure(cell, partial(cases.bank_rows, base, users, many), 0.1)
        del base
    (run.folder / f"{run.stem}.md").write_text(tables(run.about, run.cells))


def tables(about: Mapping[str, str], cells: list[Cell]) -> str:
    """The results as a page."""
    lines = ["# On a GPU", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += [
        "Times of one run in milliseconds, with the ratio to the frozen base in the same round (median "
        "over the rounds). Above the floor: the part of LoRA's additional time that a contender needs.",
        "",
    ]
    for cell in cells:
        head = ", ".join(
            f"{key} {value}" for key, value in cell.items() if not isinstance(value, (dict, list))
        )
        lines += [f"## {head}", ""]
        if "end" in cell:
            lines += ["```", *cell["end"], "```", ""]
        if "ms" not in cell:
            continue
        lora = cell["ratio"].get(LORA, 1.0) - 1
        lines += ["| contender | ms | ratio | above the floor, of LoRA's |", "|---|---:|---:|---:|"]
        for name, value in cell["ms"].items():
            part = f"{(cell['ratio'][name] - 1) / lora:.2f}" if lora > 0 else ""
            lines.append(f"| {name} | {value:.3f} | {cell['ratio'][name]:.3f} | {part} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
