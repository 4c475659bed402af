"""Ranks that change in training, beside a fixed one: the same final size, on film reviews.

    python benchmarks/quality/ranks.py

trains adapters of all-MiniLM-L6-v2 with schedules of ranks, which all end at the same rank, chooses the
learning rate of each format on validation rows, and writes ranks.md with the scores on test rows. The
falling schedule runs twice: the optimiser's state is carried over a change, or dropped. It goes on where it
was stopped. About an hour of one core.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tasks import TASKS, Task
from torch import nn

import lortalib

FOLDER = Path(__file__).parent
RUNS = FOLDER.parents[1] / "runs" / "quality" / "ranks.jsonl"
STEPS, SEEDS, EXPONENTS, HEAD_RATE, FINAL = 100, 3, (-4, -3), 5e-3, 4
FORMATS = ("cp", "tt")


class Schedule(NamedTuple):
    """The ranks of one training.

    Attributes:
        first: the rank at the start.
        later: the ranks by the step after which they hold.
        carried: whether the optimiser keeps its state of the adapter over a change.
    """

    first: int
    later: dict[int, int]
    carried: bool = True


FALLING, RISING = {25: 8, 50: FINAL}, {25: 2, 50: FINAL}
FIXED = f"fixed {FINAL}"
SCHEDULES = {
    FIXED: Schedule(FINAL, {}),
    "16, 8, 4": Schedule(16, FALLING),
    "16, 8, 4, state dropped": Schedule(16, FALLING, carried=False),
    "1, 2, 4": Schedule(1, RISING),
}


def film_reviews() -> Task:
    """Film reviews in small batches, with fewer rows for scores than in the study."""
    return dataclasses.replace(
        TASKS["reviews"], steps=STEPS, batch=16, validation=500, test=1000, rows={}
    )


def trial(task: Task, name: str, schedule: str, exponent: int, seed: int) -> dict[str, Any]:
    """Train once and score on validation and test rows."""
    first, later, carried = SCHEDULES[schedule]
    model, new = task.fresh(seed)
    source = torch.Generator().manual_seed(seed)
    adapter = lortalib.nn.apply(model, name, first, train_also=new, generator=source)
    groups = lortalib.nn.parameter_groups(adapter, 10 ** (exponent / 2), modules_lr=HEAD_RATE)
    optimizer = torch.optim.AdamW(groups)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
    ranks = later and lortalib.nn.RankSchedule(adapter, optimizer, later, generator=source)
    model.train()
    for rows in task.batches(seed):
        task.loss(model, rows).backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        if ranks and ranks.step() and not carried:
            for parameter in adapter.parameters():
                del optimizer.state[parameter]
        optimizer.zero_grad()
        rates.step()
    return {
        "format": name,
        "schedule": schedule,
        "exponent": exponent,
        "seed": seed,
        "parameters": adapter.count(),
        "errors": [max(e.values()) for e in ranks.errors.values()] if ranks else [],
        "validation": task.score(model, "validation"),
        "test": task.score(model, "test"),
    }


def rate_at(step: int) -> float:
    """The learning rate's factor: it rises for a tenth of the steps, then falls as a cosine."""
    warm = STEPS // 10
    return min(
        (step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / (STEPS - warm))
    )


def best(records: list[dict[str, Any]]) -> int:
    """The exponent with the lowest validation loss."""
    return int(min(records, key=lambda r: r["validation"]["loss"])["exponent"])


def all_trials(task: Task) -> Iterator[dict[str, Any]]:
    """Run what is not in the file yet: the fixed rank at each rate, then all schedules at the best one."""
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    lines = RUNS.read_text(encoding="utf-8").splitlines() if RUNS.exists() else []
    known = {key(record): record for record in map(json.loads, lines)}

    def run(*place: Any) -> dict[str, Any]:
        if place not in known:
            known[place] = trial(task, *place)
            with RUNS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[place]) + "\n")
        return known[place]

    rates = {name: best([run(name, FIXED, e, 0) for e in EXPONENTS]) for name in FORMATS}
    for schedule in SCHEDULES:
        for name in FORMATS:
            for seed in range(SEEDS):
                yield run(name, schedule, rates[name], seed)


def key(record: dict[str, Any]) -> tuple[str, str, int, int]:
    """What tells one trial from the others."""
    return record["format"], record["schedule"], record["exponent"], record["seed"]


def table(records: list[dict[str, Any]]) -> str:
    """The scores, in Markdown."""
    head = (
        "| format | ranks | parameters | rate | error of each pruning | test accuracy | test loss |"
    )
    lines = [head, "|---|---|---|---|---|---|---|"]
    for name in FORMATS:
        for schedule in SCHEDULES:
            own = [r for r in records if (r["format"], r["schedule"]) == (name, schedule)]
            errors = zip(*(r["errors"] for r in own))
            cells = [
                f"`{name}`",
                schedule,
                f"{own[0]['parameters']:,}",
                f"{10 ** (own[0]['exponent'] / 2):.2g}",
                ", ".join(f"{statistics.mean(each):.2f}" for each in errors),
                mean([r["test"]["accuracy"] for r in own]),
                mean([r["test"]["loss"] for r in own]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(values: list[float]) -> str:
    """The mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def main() -> None:
    """Run everything and write the page."""
    task = film_reviews()
    records = list(all_trials(task))
    rates = ", ".join(f"{10 ** (exponent / 2):.2g}" for exponent in EXPONENTS)
    about = (
        f"Written by `ranks.py`. Film reviews, all-MiniLM-L6-v2, q, k, v, o, AdamW, {STEPS} steps of "
        f"{task.batch} rows; ranks change after steps 25 and 50 and all end at {FINAL}. The rate of a "
        f"format is the one of {rates} with the lowest loss of the fixed rank on {task.validation} "
        f"validation rows with one seed. Scores are over {task.test:,} test rows: the mean over {SEEDS} "
        "seeds and its standard error. *State dropped*: the optimiser forgets its averages for the adapter "
        "at each change; otherwise they are carried over. *Error of each pruning*: the relative error of the "
        "tensor, averaged over the seeds; 0 where ranks grow."
    )
    text = f"# Ranks that change in training\n\n{about}\n\n{table(records)}\n"
    (FOLDER / "ranks.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
