"""Accuracy against trainable parameters: lortalib, HF PEFT, the frozen base, full fine-tuning.

    python benchmarks/quality/study.py --write-plan     writes plan.md, before anything is run
    python benchmarks/quality/study.py                  runs what results.jsonl does not have yet
    python benchmarks/quality/study.py --task reviews --only "lortalib CP"
    python benchmarks/quality/tables.py                 tables and plots from results.jsonl

Every pair of task and method: the learning rate is searched with seed 0 by the loss on validation
rows, on the grid 10^(k/2), from the method's start outwards until both neighbours of the best have
been run (at most six rates); then the other seeds run at that rate. A rate is as good as the mean over
the seeds run at it, so one that is good with one seed and diverges with another gives way to its
neighbour. Killed, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lortalib

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
#: Rates of one search, at most.
LONGEST = 6

Record = dict[str, Any]


def records() -> list[Record]:
    """What has been run."""
    if not RESULTS.exists():
        return []
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def quality(record: Record) -> float:
    """Loss on validation rows, by which a rate is chosen; a training that diverged comes last."""
    found = record["validation"]
    return float(found["loss"]) if found else float("inf")


def chosen(found: Sequence[Record]) -> int:
    """The exponent of the learning rate that is best in the mean over the seeds run at it.

    Of those that all diverged, the lowest.
    """
    losses: dict[int, dict[int, float]] = {}
    for record in found:
        losses.setdefault(record["exponent"], {})[record["seed"]] = quality(record)
    return min(losses, key=lambda k: (sum(losses[k].values()) / len(losses[k]), k))


def scored(found: Sequence[Record], exponent: int) -> dict[int, Record]:
    """Records of a rate that have a test score, by seed."""
    return {r["seed"]: r for r in found if r["exponent"] == exponent and r["test"]}


def following(
    found: Sequence[Record], start: int, seeds: int, rate: bool = True, below: bool = False
) -> tuple[int, int] | None:
    """The next run of a pair of task and method.

    Args:
        found: its records.
        start: exponent where the search begins.
        seeds: how many in the end.
        rate: whether the method has a learning rate of its own.
        below: whether the rate below the start is run whatever the others give: where the best checkpoint
            counts, a training that diverged has the loss of its beginning, so a search could climb away.

    Returns:
        Exponent and seed, or None where nothing is left to run.

    Example:
        >>> run = {"seed": 0, "exponent": -4, "validation": {"loss": 0.5}, "test": {"loss": 0.5}}
        >>> following([], -4, 2), following([run], -4, 2)
        ((-4, 0), (-3, 0))
    """
    swept = {r["exponent"] for r in found if r["seed"] == 0}
    if not swept:
        return start, 0
    best = chosen(found)
    # Upwards first: what diverges ends early.
    for exponent in (best + 1, best - 1, *[start - 1] * below) if rate else ():
        if exponent not in swept and len(swept) < LONGEST:
            return exponent, 0
    own = [r for r in found if r["exponent"] == best]
    if not all(math.isfinite(quality(r)) for r in own):
        return None
    due = set(range(seeds)) - set(scored(own, best))
    return (best, min(due)) if due else None


def work(pair: tuple[str, str]) -> str:
    """Run all that a pair of task and method lacks.

    Returns:
        What to print.
    """
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from fitting import trial
    from plan import METHODS
    from tasks import TASKS

    task = TASKS[pair[0]]
    method = next(m for m in METHODS if m.label == pair[1])
    while True:
        own = [r for r in records() if (r["task"], r["method"]) == pair]
        rate = method.library != "frozen"
        due = following(own, method.start, task.seeds, rate, below=task.looks > 0)
        if due is None:
            best = chosen(own)
            scores = [r["test"][task.metric] for r in scored(own, best).values()]
            return f"{task.name}: {method.label}: 10^({best}/2): {scores}"
        try:
            # A rate that is met for the first time need not be scored where another is better.
            new = all(r["exponent"] != due[0] for r in own)
            others = [quality(r) for r in own if new and r["seed"] == 0]
            record = trial(task, method, *due, to_beat=min(others, default=math.inf))
        except Exception:
            return f"{task.name}: {method.label}: FAILED\n{traceback.format_exc(limit=-3)}"
        line = json.dumps({**record, "version": lortalib.__version__})
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def pairs(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Pairs of task and method in the order of the plan."""
    from plan import PLAN

    for task, label in PLAN[options.since - 1 :]:
        if options.task in (None, task) and (options.only or "") in label:
            yield task, label


def main() -> None:
    """Write the plan, or run what is due."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--write-plan", action="store_true")
    found.add_argument("--task", help="only this task")
    found.add_argument("--only", help="only methods whose label has this in it")
    found.add_argument("--since", type=int, default=1, help="begin at this number of the plan")
    found.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    options = found.parse_args()
    if options.write_plan:
        from plan import text

        (HERE / "plan.md").write_text(text(LONGEST), encoding="utf-8")
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    due = list(pairs(options))
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for number, said in enumerate(pool.imap_unordered(work, due), 1):
            print(f"[{number}/{len(due)}] {said}", flush=True)


if __name__ == "__main__":
    main()
