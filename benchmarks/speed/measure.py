"""What the benchmarks of speed and size share: interleaved timing, paired ratios, tables, files.

Times of one machine drift, so nothing here compares times of different runs: all contenders run in
turn within each round, and what is reported are ratios of times of one round, as a median over the
rounds with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: Quick runs write here, so that they never replace the tables under version control.
QUICK_FOLDER = Path(__file__).parents[2] / "runs"
MIB = 2**20

Times = dict[str, list[float]]


class Spread(NamedTuple):
    """Median, smallest and largest of the values of all rounds."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        """As it stands in a table: ``1.09 [1.07, 1.12]``."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


class Timed(NamedTuple):
    """One contender of a cell: what is timed, and what goes before it untimed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def spread(values: Iterable[float]) -> Spread:
    """Median, smallest and largest."""
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values))


def interleave(
    contenders: Mapping[str, Timed],
    rounds: int,
    *,
    anchor: str = "",
    every: int = 5,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Seconds of every contender in every round.

    Each round runs all contenders in an order of its own, drawn at random, so that a drift of the
    machine and the traces that one contender leaves in the caches and in the heap fall on all alike.

    Args:
        contenders: by name.
        rounds: how many rounds count.
        anchor: the contender that all others are compared with. It runs again before every few of
            them, and its time of a round is the median of these runs.
        every: how many others run between two runs of the anchor.
        warm_up: rounds before those that count.
        clock: what tells the seconds; ``time.process_time`` leaves out what other processes take.
    """
    names = [name for name in contenders if name != anchor]
    times: Times = {name: [] for name in contenders}
    draw = random.Random(0)
    gc.collect()
    gc.freeze()  # what is there already is not looked through after every round
    gc.disable()
    try:
        for number in range(-warm_up, rounds):
            order = draw.sample(names, len(names))
            if anchor:
                order = [
                    name
                    for begin in range(0, len(order), every)
                    for name in (anchor, *order[begin : begin + every])
                ]
            taken: Times = {name: [] for name in contenders}
            for name in order:
                taken[name].append(_seconds(contenders[name], clock))
            if number >= 0:
                for name, values in taken.items():
                    times[name].append(statistics.median(values))
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def _seconds(contender: Timed, clock: Callable[[], float]) -> float:
    contender.prepare()
    begin = clock()
    contender.run()
    return clock() - begin


def ratios(times: Times, name: str, base: str) -> Spread:
    """Time of one contender relative to another's in the same round."""
    return spread(a / b for a, b in zip(times[name], times[base]))


def overhead_ratios(times: Times, name: str, other: str, floor: str) -> Spread | None:
    """Time above the floor relative to another contender's time above it, in the same round.

    A round in which the other one was not above the floor says nothing and is left out; None if that
    was every round.
    """
    rows = zip(times[name], times[other], times[floor])
    values = [(a - f) / (b - f) for a, b, f in rows if b > f]
    return spread(values) if values else None


def medians(times: Times) -> dict[str, float]:
    """Median seconds of every contender."""
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(run: Callable[[], object], times: int = 5) -> float:
    """Median seconds of a call, after one that does not count."""
    run()
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return spread(taken).median


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine() -> str:
    """One line that says what the numbers were measured on."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return (
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, {libraries}."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    name = facts.get("model name", platform.machine())
    flags = facts.get("flags", "").split()
    units = [unit for unit in ("avx2", "avx512f", "amx_bf16") if unit in flags]
    return f"{name} ({', '.join(units)})" if units else name


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write(script: str, parts: Iterable[str], data: Mapping[str, Any], *, quick: bool) -> Path:
    """Write the tables and the raw numbers of a script, beside it or, of a quick run, aside.

    Args:
        script: the script's ``__file__``.
        parts: paragraphs and tables of the markdown file, after the line on the machine.
        data: what goes into the json file, for plots.
        quick: whether this was a quick run.

    Returns:
        Path of the markdown file.
    """
    beside = Path(script).with_suffix(".md")
    target = QUICK_FOLDER / f"{beside.stem}-quick.md" if quick else beside
    target.parent.mkdir(exist_ok=True)
    head = "A quick run: too few rounds to go by.\n\n" if quick else ""
    text = "\n\n".join([head + machine(), *parts]) + "\n"
    target.write_text(text, encoding="utf-8")
    content = json.dumps({"machine": machine(), **data}, indent=1, allow_nan=False)
    target.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    print(f"wrote {target.name} and {target.with_suffix('.json').name} in {target.parent.name}/")
    return target


def arguments(doc: str | None, repetitions: int, quick: int = 3) -> argparse.Namespace:
    """Command line of a benchmark: ``quick``, and ``repetitions`` as given or by default."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    parser.add_argument(
        "--quick", action="store_true", help="few cells and rounds; writes into runs/ instead"
    )
    parser.add_argument("--repetitions", type=int, help="rounds of a cell (of the shortest one)")
    chosen = parser.parse_args()
    if chosen.repetitions is None:
        chosen.repetitions = quick if chosen.quick else repetitions
    return chosen


class Progress:
    """Prints a line for each finished cell, with the time since the start."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()

    def say(self, line: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"{time.perf_counter() - self.begin:6.0f} s  {line}", flush=True)
