"""Accuracy against trainable numbers: lortalib, HF PEFT, the frozen base, full fine-tuning.

    python benchmarks/quality/study.py --write-plan     writes plan.md, before anything is run
    python benchmarks/quality/study.py                  runs what results.jsonl does not have yet
    python benchmarks/quality/study.py --task reviews --only "lortalib CP"
    python benchmarks/quality/tables.py                 tables and plots from results.jsonl

Every pair of task and method: the learning rate is searched with seed 0 by the score on validation
rows, on the grid 10^(k/2), from the method's start outwards until both neighbours of the best have
been run (at most six runs); then the other seeds run at that rate. Killed, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lortalib

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
#: Runs of one search for a learning rate, at most.
LONGEST = 6

Record = dict[str, Any]


def records() -> list[Record]:
    """What has been run."""
    if not RESULTS.exists():
        return []
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def quality(record: Record, metric: str, better: int) -> float:
    """The score by which a learning rate is chosen; a training that diverged is last."""
    found = record["validation"]
    return better * found[metric] if found else float("-inf")


def chosen(found: Sequence[Record], metric: str, better: int) -> int:
    """The exponent of the best learning rate of seed 0; of equals the one with the lower loss."""
    swept = [record for record in found if record["seed"] == 0]
    loss = {id(r): r["validation"]["loss"] if r["validation"] else float("inf") for r in swept}
    best = max(swept, key=lambda r: (quality(r, metric, better), -loss[id(r)]))
    return int(best["exponent"])


def following(
    found: Sequence[Record], start: int, metric: str, better: int, seeds: int, rate: bool = True
) -> tuple[int, int] | None:
    """The next run of a pair of task and method.

    Args:
        found: its records.
        start: exponent where the search begins.
        metric: of the task.
        better: 1 or -1.
        seeds: how many in the end.
        rate: whether the method has a learning rate of its own.

    Returns:
        Exponent and seed, or None where nothing is left to run.
    """
    swept = {r["exponent"] for r in found if r["seed"] == 0}
    if not swept:
        return start, 0
    best = chosen(found, metric, better)
    # Upwards first: what diverges ends early.
    for exponent in (best + 1, best - 1) if rate else ():
        if exponent not in swept and len(swept) < LONGEST:
            return exponent, 0
    done = {r["seed"] for r in found if r["exponent"] == best}
    return next(((best, seed) for seed in range(seeds) if seed not in done), None)


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
    from plan import METHODS
    from tasks import TASKS
    from trial import trial

    task = TASKS[pair[0]]
    method = next(m for m in METHODS if m.label == pair[1])
    while True:
        own = [r for r in records() if (r["task"], r["method"]) == pair]
        rate = method.library != "frozen"
        due = following(own, method.start, task.metric, task.better, task.seeds, rate)
        if due is None:
            best = chosen(own, task.metric, task.better)
            scores = [r["test"] and r["test"][task.metric] for r in own if r["exponent"] == best]
            return f"{task.name}: {method.label}: 10^({best}/2): {scores}"
        try:
            swept = [quality(r, task.metric, task.better) for r in own if due[1] == 0]
            record = trial(task, method, *due, to_beat=max(swept, default=float("-inf")))
        except Exception:
            return f"{task.name}: {method.label}: FAILED\n{traceback.format_exc(limit=-3)}"
        line = json.dumps({**record, "version": lortalib.__version__})
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def pairs(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Pairs of task and method in the order of the plan."""
    from plan import PLAN

    for task, label in PLAN:
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
    found.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    options = found.parse_args()
    if options.write_plan:
        from plan import text

        (HERE / "plan.md").write_text(text(), encoding="utf-8")
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    due = list(pairs(options))
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for number, said in enumerate(pool.imap_unordered(work, due), 1):
            print(f"[{number}/{len(due)}] {said}", flush=True)


if __name__ == "__main__":
    main()
