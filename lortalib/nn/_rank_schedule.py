"""Changes the ranks of an adapter at given steps of its training."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

import torch

from .._kinds import GENERATOR, OPTIMIZER, takes
from ..decomp import Rank
from ._adapter import ADAPTER, Adapter
from ._change_rank import change_rank, changes_of, check_changeable


class RankSchedule:
    """A schedule of ranks: call `step` after every ``optimizer.step()``.

    Args:
        adapter: an adapter on a model.
        optimizer: its optimiser; see `change_rank`.
        ranks: the ranks from a step on, by the number of steps that were taken before. Each is as for
            `change_rank`.
        generator: the source of randomness for new directions; by default torch's global one.

    Attributes:
        steps: the number of steps that were taken.
        errors: for each change so far, by its step: the relative error of each network's tensor.

    Raises:
        ValueError: no ranks; a step that is not a positive integer; all that `change_rank` refuses. Every
            change is tried on the present networks, so that a training does not end at a later step.
        RuntimeError: as for `change_rank`.

    Example:
        >>> import lortalib, torch
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "cp", rank=8)
        >>> optimizer = torch.optim.AdamW(lortalib.nn.parameter_groups(adapter, 1e-2))
        >>> schedule = RankSchedule(adapter, optimizer, {1: 4, 2: 2})
        >>> for _ in range(3):
        ...     loss = model(torch.tensor([[1, 2]])).last_hidden_state.square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     _ = schedule.step()
        ...     optimizer.zero_grad()
        >>> adapter.count(), sorted(schedule.errors)
        (100, [1, 2])
    """

    @takes(adapter=ADAPTER, optimizer=OPTIMIZER, generator=GENERATOR)
    def __init__(
        self,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer,
        ranks: Mapping[int, Rank],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(ranks, Mapping) or not ranks:
            raise ValueError(
                f"ranks must map steps to ranks, such as {{100: 8, 200: 4}}; found {ranks!r}"
            )
        wrong = [
            step
            for step in ranks
            if isinstance(step, bool) or not isinstance(step, int) or step < 1
        ]
        if wrong:
            raise ValueError(
                f"a rank changes after a step, counted from 1; found the step {wrong[0]!r}"
            )
        check_changeable(adapter, optimizer)
        for rank in ranks.values():
            for group in adapter.groups:
                changes_of(adapter.network(group), rank, _aside(adapter))
        self.adapter, self.optimizer = adapter, optimizer
        self.ranks, self.generator = dict(ranks), generator
        self.steps = 0
        self.errors: dict[int, dict[str, float]] = {}

    def step(self) -> bool:
        """Count a step, and change the ranks if the schedule says so.

        If the change fails, the step is not counted, and adapter, optimiser and generator are unchanged.

        Returns:
            True if the ranks were changed.

        Raises:
            ValueError, RuntimeError: as for `change_rank`.
        """
        now = self.steps + 1
        if now in self.ranks:
            random = None if self.generator is None else self.generator.get_state()
            try:
                found = change_rank(
                    self.adapter, self.optimizer, self.ranks[now], generator=self.generator
                )
            except BaseException:
                if self.generator is not None and random is not None:
                    self.generator.set_state(random)
                raise
            self.errors[now] = found
        self.steps = now
        return now in self.ranks

    def state_dict(self) -> dict[str, Any]:
        """Return what a training needs to go on with this schedule: steps, errors, and the generator's state.

        The ranks of the moment are in the file of `Adapter.save`. To go on, load the adapter, make its
        optimiser and the schedule, and load the state of both. torch's global generator is not in it.

        Returns:
            Numbers and a tensor, which ``torch.load(..., weights_only=True)`` reads.
        """
        random = None if self.generator is None else self.generator.get_state()
        errors = {step: dict(found) for step, found in self.errors.items()}
        return {"steps": self.steps, "errors": errors, "generator": random}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called; the ranks of later steps are those that this schedule has.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: something else, or the saved schedule had a generator and this has none, or the other
                way round. The schedule is then unchanged.

        Example:
            >>> import lortalib, torch
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
            ...                              num_attention_heads=4, intermediate_size=64))
            >>> adapter = lortalib.nn.apply(model, "cp", rank=4)
            >>> optimizer = torch.optim.AdamW(lortalib.nn.parameter_groups(adapter, 1e-2))
            >>> schedule = RankSchedule(adapter, optimizer, {100: 2})
            >>> schedule.load_state_dict({"steps": 99, "errors": {}, "generator": None})
            >>> schedule.step(), adapter.count()
            (True, 100)
        """
        names = {"steps", "errors", "generator"}
        if not isinstance(state, Mapping) or set(state) != names:
            found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"a state with {', '.join(sorted(names))} is needed; found {found}. Give what state_dict() "
                "of a RankSchedule returned"
            )
        random = state["generator"]
        if (random is None) != (self.generator is None):
            had, has = ("no", "one") if random is None else ("one", "none")
            raise ValueError(
                f"the schedule that was saved had {had} generator, and this has {has}: make it with "
                "generator= as before"
            )
        steps, errors = state["steps"], state["errors"]
        if not _is_count(steps) or not _are_errors(errors):
            raise ValueError(
                f"the state is damaged: it has the steps {short(steps)} and the errors {short(errors)}; a "
                "number of steps is needed, and the errors of each network by step. Give what state_dict() "
                "of a RankSchedule returned"
            )
        if self.generator is not None:
            _set_state(self.generator, random)
        self.steps = steps
        self.errors = {step: dict(found) for step, found in errors.items()}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_errors(value: object) -> bool:
    """Return True for errors by network by step."""
    if not isinstance(value, Mapping) or not all(map(_is_count, value)):
        return False
    found = [each for each in value.values() if isinstance(each, Mapping)]
    names = [name for each in found for name in each]
    numbers = [number for each in found for number in each.values()]
    return (
        len(found) == len(value)
        and all(isinstance(name, str) for name in names)
        and all(isinstance(number, (int, float)) for number in numbers)
    )


def _set_state(generator: torch.Generator, state: Any) -> None:
    """Set the state of a generator; after an error it is unchanged."""
    try:
        generator.set_state(state)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"the state is damaged: a generator on {generator.device} cannot take its state ({error}). Give "
            "what state_dict() of a RankSchedule with a generator on the same device returned"
        ) from error


def _aside(adapter: Adapter) -> torch.Generator:
    """Make a source of randomness for trials, so that they take nothing from the user's."""
    return torch.Generator(next(adapter.networks.parameters()).device)
