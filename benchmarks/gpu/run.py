"""Training, inference and serving on a GPU, beside PEFT and the frozen base.

    make gpu                                                  nine minutes on one GPU
    python benchmarks/gpu/run.py --device cpu --size small    the same code paths anywhere

It needs torch, transformers and peft, and no network: models are random. First the tests that are marked
``gpu`` run. Then one cell after the other is timed, and the files results-<card>.json and .md are written
anew after each, so a run that is cut off keeps what it has. What did not fit into ``--minutes``, and what
failed, is listed with the reason.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import cases
import peft
import torch
import transformers
from cases import FLOOR
from clock import Work, as_graph, in_turn, ratio, wait
from page import Result, page
from plan import BANK, COMPILED, GRAPH, Cell, cells

import lortalib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: The part of the remaining time that the tests, and the rounds of one cell, may take.
TESTS_SHARE, ROUNDS_SHARE = 0.25, 0.1


class TimeUp(BaseException):
    """The time is up; no library takes this for an error of its own."""


class Run:
    """One run of the benchmark: its arguments, its clock and its results.

    Args:
        options: the arguments.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.on_gpu = self.device.type != "cpu"
        self.small = options.size == "small"
        self.only = options.only
        self.results: list[Result] = []
        self.about = describe(self.device)
        self.end: float = time.monotonic() + 60 * options.minutes
        card = re.sub(r"\W+", "-", self.about["card"].lower()).strip("-")
        self.file = Path(options.out) / f"results-{card}"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.base: tuple[str, torch.nn.Module] | None = None
        self.costs: dict[
            str, float
        ] = {}  # seconds that the last contender of a mode took to be ready
        self.may_stop = False
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, self.stop)
            signal.setitimer(
                signal.ITIMER_REAL, 60 * options.minutes, 5
            )  # a library may swallow one

    def stop(self, *_: object) -> None:
        """End what is being timed: the time is up."""
        if self.may_stop:
            raise TimeUp

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def note(self, result: Result) -> None:
        """Keep the result of a cell, on the disk too."""
        self.results.append(result)
        whole = {"about": self.about, "results": self.results}
        for suffix, text in (
            (".json", json.dumps(whole, indent=1)),
            (".md", page(self.about, self.results)),
        ):
            new = self.file.parent / f"{self.file.name}{suffix}.new"
            new.write_text(text, encoding="utf-8")
            os.replace(new, self.file.parent / f"{self.file.name}{suffix}")
        print(json.dumps(result), flush=True)

    def measure(self, cell: Cell) -> None:
        """Time one cell, or note why not."""
        if self.only not in ", ".join(map(str, cell)):
            return
        try:
            self.may_stop = True
            found = self.timed(cell) if self.left > 0 else {"not run": "no time was left"}
        except TimeUp:
            found = {"not run": "the time was up before it was done"}
        except Exception as error:  # one cell that fails does not cost the others
            found = {"not run": message(error)}
        finally:
            self.may_stop = False
        self.note({**cell._asdict(), **found})
        torch.compiler.reset()
        self.clean()

    def timed(self, cell: Cell) -> Result:
        """The times of one cell."""
        if cell.mode == GRAPH and not self.on_gpu:
            return {"not run": "CUDA graphs need CUDA"}
        pool = torch.cuda.graph_pool_handle() if cell.mode == GRAPH else None
        works: dict[str, Work] = {}
        memory: dict[str, int] = {}
        failed: dict[str, str] = {}
        for name, make in self.makers(cell).items():
            if self.left < self.costs.get(cell.mode, 0):
                failed[name] = "there was too little time left to make it ready"
                continue
            begin = time.monotonic()
            try:
                works[name], memory[name] = self.ready(make, cell.mode, pool)
            except Exception as error:  # nor does one contender
                failed[name] = message(error)
            self.costs[cell.mode] = time.monotonic() - begin
            self.clean()
        if FLOOR not in works:
            return {"not run": failed[FLOOR]}
        rounds, repeats = (2, 1) if self.small else (9, 5)
        until = time.monotonic() + ROUNDS_SHARE * self.left
        times = in_turn(works, self.device, rounds, repeats, until)
        return {
            "rounds": len(times[FLOOR]),
            "ms": {name: round(statistics.median(each), 4) for name, each in times.items()},
            "ratio": {name: round(ratio(times, name, FLOOR), 4) for name in times},
            "MiB": memory if self.on_gpu else {},
            **({"failed": failed} if failed else {}),
        }

    def makers(self, cell: Cell) -> dict[str, Callable[[], Work]]:
        """For each contender of a cell what makes its work."""
        base = self.model(cell.model)
        vocabulary = base.get_input_embeddings().num_embeddings  # type: ignore[operator]
        ids = torch.randint(vocabulary, (cell.rows, cell.tokens), device=self.device)
        if cell.work == BANK:
            return cases.bank_rows(base, ids[:1], cell.rows)
        return {name: partial(self.make, cell, name, base, ids) for name in cell.contenders()}

    def make(self, cell: Cell, name: str, base: torch.nn.Module, ids: torch.Tensor) -> Work:
        """The work of one contender."""
        model = cases.CONTENDERS[name](base)
        if cell.mode == COMPILED:
            # Elsewhere compiling takes longer than running; the frames are traced all the same.
            backend = "inductor" if self.device.type == "cuda" else "aot_eager"
            model.compile(backend=backend, dynamic=False)
        return cases.WORKS[cell.work](model, ids)

    def model(self, shape: str) -> torch.nn.Module:
        """The base; one at a time is in memory."""
        if self.base is None or self.base[0] != shape:
            self.base = None
            self.clean()
            dtype = torch.bfloat16 if self.on_gpu else torch.float32
            self.base = shape, cases.llama(shape, self.device, dtype)
        return self.base[1]

    def ready(self, make: Callable[[], Work], mode: str, pool: Any) -> tuple[Work, int]:
        """A work that has run, and the MiB that it took."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device) if self.on_gpu else 0
        work = make()
        for _ in range(2):  # in the second the optimiser has its state
            work.rewind()
            work.run()
        wait(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before if self.on_gpu else 0
        return (as_graph(work, pool) if mode == GRAPH else work), peak >> 20

    def clean(self) -> None:
        """Give back memory that nothing uses."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def message(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def describe(device: torch.device) -> dict[str, str]:
    """The machine and the versions."""
    about = {"card": "cpu", "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    if device.type != "cpu":
        card = torch.cuda.get_device_properties(device)
        about["card"] = card.name
        about["memory"] = f"{card.total_memory / 2**30:.0f} GiB"
        about["driver"] = output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        about["CUDA"] = str(torch.version.cuda)
    return {
        **about,
        "date": date.today().isoformat(),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "lortalib": lortalib.__version__,
    }


def output(*command: str) -> str:
    """The first line that a command prints."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (ended.stdout.strip().splitlines() or ["unknown"])[0]


def tested(seconds: float) -> Result:
    """Run the tests marked ``gpu``, and say how they ended.

    Args:
        seconds: after which they are ended.
    """
    if importlib.util.find_spec("pytest") is None:
        return {"work": "tests", "not run": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    command += ["-k", "not benchmark", "--tb=short"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"work": "tests", "not run": f"not done after {seconds:.0f} seconds"}
    said = (ended.stdout + ended.stderr).strip().splitlines()
    return {"work": "tests", "exit code": ended.returncode, "end": said[-40:]}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it ends")
    parser.add_argument("--only", default="", help="only cells that hold this text: 'eager', '7B'")
    parser.add_argument("--out", default=str(HERE), help="folder of the tables")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is here; try --device cpu --size small --out runs")
    run = Run(options)
    if not options.no_tests:
        run.note(tested(TESTS_SHARE * run.left))
    for cell in cells(run.small):
        run.measure(cell)


if __name__ == "__main__":
    main()
