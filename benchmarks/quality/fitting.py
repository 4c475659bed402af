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
#: Looks at the validation rows without a better loss, after which a training ends.
PATIENCE = 3
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
    # With looks at the validation rows, what they found best stands even where a later step diverged.
    usable = bool(task.looks) or all(map(math.isfinite, losses))
    record["validation"] = rounded(task, model, "validation") if usable else None
    reached = record["validation"]
    wanted = reached and reached["loss"] <= to_beat
    record["test"] = rounded(task, model, "test") if wanted else None
    last = losses[-max(1, len(losses) // 10) :]
    record["train_loss"] = round(sum(last) / len(last), 5) if usable and last else None
    record["steps"] = len(losses)
    return {**record, "seconds": round(time.perf_counter() - begin, 1)}


def rounded(task: Task, model: nn.Module, part: str) -> dict[str, float] | None:
    """The scores of a part, None where they are no numbers."""
    with autocast():
        found = task.score(model, part)
    good = all(map(math.isfinite, found.values()))
    return {name: round(value, 5) for name, value in found.items()} if good else None


class Checkpoint:
    """The trained parameters at the look that found the lowest loss on the validation rows.

    Args:
        task: whose rows they are.
        model: in training.
        trained: its trained parameters.
    """

    def __init__(self, task: Task, model: nn.Module, trained: list[nn.Parameter]) -> None:
        self.task, self.model, self.trained = task, model, trained
        self.loss, self.unimproved = math.inf, 0
        self.values = [p.detach().clone() for p in trained]

    def look(self) -> bool:
        """Measure, keep the parameters if they are the best so far, and say whether to go on."""
        found = rounded(self.task, self.model, "validation")
        self.model.train()
        if found is None or found["loss"] >= self.loss:
            self.unimproved += 1
            return self.unimproved < PATIENCE
        self.loss, self.unimproved = found["loss"], 0
        self.values = [p.detach().clone() for p in self.trained]
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model back the best parameters, of the start where no look found a finite loss."""
        for parameter, value in zip(self.trained, self.values):
            parameter.copy_(value)


def learn(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> list[float]:
    """Train for the task's steps; a loss that is no number, or `Checkpoint.look`, ends it early.

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
    best = Checkpoint(task, model, trained) if task.looks else None
    model.train()
    losses = []
    for step, rows in enumerate(task.batches(seed), 1):
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
        if best and step % (task.steps // task.looks) == 0 and not best.look():
            break
    if best:
        best.restore()
    return losses
