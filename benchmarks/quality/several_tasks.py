"""Trains one adapter on three tasks, beside an adapter for each of as many parameters together.

    python benchmarks/quality/several_tasks.py

all-MiniLM-L6-v2 says whether film reviews, product reviews and tweets are for or against something. Every
task has a head of its own. The last row adds the tweets to an adapter that was trained on the other two, all
else frozen. Writes several_tasks.md; about ten minutes of one core.
"""

from __future__ import annotations

import copy
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
from tasks import assets, autocast, base, padded, tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel

import lortalib

OUT = Path(__file__).with_suffix(".md")
TASKS = ("films", "products", "tweets")
#: Steps for each task, rows of a step, tokens of a row, test rows of a task.
STEPS, BATCH, LONGEST, TEST = 100, 16, 32, 800
RATE, HEAD_RATE, SEEDS = 1e-2, 5e-3, 3
#: Ranks for which three separate adapters have at most as many parameters as one for all tasks.
RANK, OWN_RANK = 16, 6

Rows = list[tuple[list[int], int]]
Choose = Callable[[list[str]], AbstractContextManager[object]]


@cache
def rows_of(task: str) -> dict[str, Rows]:
    """Rows of tokens and label, for training and for the test."""
    if task == "films":
        found = assets.film_reviews()
    else:
        kind = {"products": "amazonReviewSnippets", "tweets": "tweets"}[task]
        rated = assets.rated_sentences(kind)
        found = [(text, int(rating > 0)) for text, rating in rated if abs(rating) > 0.5]
    random.Random(0).shuffle(found)
    ids = tokenizer(assets.minilm())([text for text, _ in found])["input_ids"]
    rows = [(row[:LONGEST], label) for row, (_, label) in zip(ids, found)]
    return {"test": rows[:TEST], "train": rows[TEST:]}


class Classifier(nn.Module):
    """The encoder with a head of two classes for each task."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.body = copy.deepcopy(base(AutoModel, assets.minilm())).requires_grad_(False)
        torch.manual_seed(seed)
        self.heads = nn.ModuleDict({task: nn.Linear(384, 2) for task in TASKS})

    def forward(self, rows: Rows, tasks: Sequence[str]) -> Tensor:
        """The logits of rows, each of its task."""
        ids, mask = padded([row for row, _ in rows], 0)
        with autocast():
            states = self.body(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        means = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return torch.stack([self.heads[task](mean) for task, mean in zip(tasks, means)])


def batches(tasks: Sequence[str], seed: int) -> Iterator[tuple[Rows, list[str]]]:
    """Batches without end: rows of all tasks in turn."""
    draw, queues = random.Random(seed), {task: Rows() for task in tasks}
    named = [tasks[k % len(tasks)] for k in range(BATCH * len(tasks))]
    while True:
        for start in range(0, len(named), BATCH):
            own = named[start : start + BATCH]
            for task in own:
                if not queues[task]:
                    queues[task] = draw.sample(rows_of(task)["train"], len(rows_of(task)["train"]))
            yield [queues[task].pop() for task in own], own


def train(model: Classifier, tasks: Sequence[str], seed: int, choose: Choose) -> None:
    """Train what requires gradients on rows of these tasks, with as many steps for each."""
    trained = [p for p in model.body.parameters() if p.requires_grad]
    heads = [p for task in tasks for p in model.heads[task].parameters()]
    groups = [{"params": trained, "lr": RATE}, {"params": heads, "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
    steps = STEPS * len(tasks)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (steps / 10), 1 - step / steps)
    )
    model.train()
    for _, (rows, named) in zip(range(steps), batches(tasks, seed)):
        with choose(named):
            loss = cross_entropy(model(rows, named), torch.tensor([label for _, label in rows]))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: Classifier, task: str, choose: Choose) -> float:
    """The share of the test rows of a task that are told right."""
    model.eval()
    right, rows = 0, sorted(rows_of(task)["test"], key=lambda row: len(row[0]))
    for start in range(0, len(rows), 50):
        part = rows[start : start + 50]
        with choose([task] * len(part)):
            found = model(part, [task] * len(part)).argmax(-1)
        right += int((found == torch.tensor([label for _, label in part])).sum())
    return right / len(rows)


def without(named: list[str]) -> AbstractContextManager[object]:
    """Choose nothing: the adapter, if there is one, is of one task."""
    return nullcontext()


def frozen(seed: int) -> tuple[int, list[float]]:
    """Train the heads alone."""
    model = Classifier(seed)
    train(model, TASKS, seed, without)
    return 0, [accuracy(model, task, without) for task in TASKS]


def together(seed: int) -> tuple[int, list[float]]:
    """Train one adapter on mixed batches of all tasks."""
    model = Classifier(seed)
    adapter = lortalib.nn.apply(model.body, "metatt_41d", RANK, tasks=TASKS)
    assert isinstance(adapter, lortalib.nn.TaskAdapter)
    train(model, TASKS, seed, adapter.using)
    return adapter.count(), [accuracy(model, task, adapter.using) for task in TASKS]


def separate(seed: int) -> tuple[int, list[float]]:
    """Train an adapter for each task alone."""
    count, found = 0, []
    for task in TASKS:
        model = Classifier(seed)
        count += lortalib.nn.apply(model.body, "metatt_4d", OWN_RANK).count()
        train(model, [task], seed, without)
        found.append(accuracy(model, task, without))
    return count, found


def added(seed: int) -> tuple[int, list[float]]:
    """Train an adapter on two tasks, then add the third with all else frozen."""
    model = Classifier(seed)
    adapter = lortalib.nn.apply(model.body, "metatt_41d", RANK, tasks=TASKS[:2])
    assert isinstance(adapter, lortalib.nn.TaskAdapter)
    train(model, TASKS[:2], seed, adapter.using)
    before = [accuracy(model, task, adapter.using) for task in TASKS[:2]]
    adapter.add_task(TASKS[2])
    train(model, TASKS[2:], seed, adapter.using)
    after = [accuracy(model, task, adapter.using) for task in TASKS]
    assert after[:2] == before
    return adapter.count(), after


METHODS = {
    "heads alone": frozen,
    f"an adapter for each task, `metatt_4d` of rank {OWN_RANK}": separate,
    f"one adapter of three tasks, `metatt_41d` of rank {RANK}": together,
    f"the same, trained on films and products; then tweets added, {RANK**2} numbers": added,
}


def cell(values: Sequence[float]) -> str:
    """The mean and its standard error, in per cent."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * statistics.mean(values):.1f} ± {100 * error:.1f}"


def main() -> None:
    """Run everything and write the page."""
    begin = time.process_time()
    lines = [f"| | parameters | {' | '.join(TASKS)} | mean |", "|---|---|---|---|---|---|"]
    for label, method in METHODS.items():
        found = []
        for seed in range(SEEDS):
            found.append(method(seed))
            print(label, *found[-1], f"{time.process_time() - begin:.0f} s", file=sys.stderr)
        scores = [scores for _, scores in found]
        cells = [cell(each) for each in (*zip(*scores), [statistics.mean(s) for s in scores])]
        lines.append(f"| {label} | {found[0][0]:,} | {' | '.join(cells)} |")
    about = (
        f"Written by `several_tasks.py`: all-MiniLM-L6-v2 with a head for each task, {STEPS} steps of "
        f"{BATCH} rows of at most {LONGEST} tokens for each task, AdamW at {RATE:g} (heads {HEAD_RATE:g}), "
        "in the last row first for two tasks and then for the third. "
        f"Accuracy in per cent on {TEST} test rows of each task, mean of {SEEDS} seeds ± standard error. "
        "Parameters are those of the adapters; the heads have 770 for each task."
    )
    OUT.write_text("\n".join([f"# Several tasks\n\n{about}\n", *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
