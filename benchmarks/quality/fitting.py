"""One training: a task, a method, a learning rate, a seed."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from methods import Method
from tasks import Task, autocast
from torch import nn

#: Of the classifier, for every method.
HEAD_RATE = 5e-3
#: Steps in which the learning rate rises, as a part of all; then it falls as a cosine.
WARM = 0.1


def trial(
    task: Task, method: Method, exponent: int, seed: int, to_beat: float = math.inf
) -> dict[str, Any]:
    """Train once, and score on validation rows and, where that is not yet beaten, on test rows.

    Args:
        task: of `tasks.TASKS`.
        method: what trains.
        exponent: k of the learning rate 10^(k/2).
        seed: of the order of rows, of new modules and of the adapter.
        to_beat: the lowest validation loss of another rate.

    Returns:
        A record for results.jsonl; scores of a training that diverged are None.
    """
    begin = time.perf_counter()
    model, new = task.fresh(seed)
    groups = method.attach(model, task, new, seed)
    rate = 10 ** (exponent / 2)
    head = [p for name in new for p in model.get_submodule(name).parameters()]
    optimizer = (
        torch.optim.AdamW(
            [{"params": params, "lr": rate * speed} for speed, params in groups]
            + [{"params": head, "lr": HEAD_RATE}] * bool(head),
            weight_decay=0.0,
        )
        if groups or head
        else None
    )
    parameters = sum(p.numel() for _, params in groups for p in params)
    losses = learn(task, model, optimizer, seed) if optimizer else []
    record: dict[str, Any] = {
        "task": task.name,
        "method": method.label,
        "exponent": exponent,
        "seed": seed,
        "parameters": parameters,
    }
    finite = all(map(math.isfinite, losses))
    record["validation"] = rounded(task, model, "validation") if finite else None
    reached = record["validation"]
    wanted = reached and reached["loss"] <= to_beat
    record["test"] = rounded(task, model, "test") if wanted else None
    last = losses[-max(1, len(losses) // 10) :]
    record["train_loss"] = round(sum(last) / len(last), 5) if finite and last else None
    return {**record, "seconds": round(time.perf_counter() - begin, 1)}


def rounded(task: Task, model: nn.Module, part: str) -> dict[str, float] | None:
    """The scores of a part, None where they are no numbers."""
    with autocast():
        found = task.score(model, part)
    good = all(map(math.isfinite, found.values()))
    return {name: round(value, 5) for name, value in found.items()} if good else None


def learn(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> list[float]:
    """Train for the task's steps; stops where the loss is no number.

    Returns:
        The loss of every step.
    """
    warm = max(1, round(WARM * task.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm,
            0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, task.steps - warm)),
        ),
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    losses = []
    for rows in task.batches(seed):
        with autocast():
            loss = task.loss(model, rows)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return losses
