"""Gives the hooks of an adapter with tasks the parameters of the tasks that rows, or tokens, have chosen."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..._torch import not_compiled
from ...decomp import Network
from .._bank import BatchTensors, Chosen, CurrentBatch
from .._forward import PairSource
from .._recompute import CheckpointScope
from .._sharded import processes
from .network import TaskLine


class TaskOwner(Protocol):
    """The interface of an adapter with tasks that its rows use."""

    name: str
    tasks: tuple[str, ...]

    @property
    def scope(self) -> CheckpointScope:
        """The scope of its forwards."""

    @property
    def adds_update(self) -> bool:
        """True if the forward under way adds the update."""

    @property
    def is_on_model(self) -> bool:
        """True while the adapter is on a model."""

    @property
    def default(self) -> str | None:
        """The task of forwards outside of contexts."""

    def network_of(self, group: str, task: str) -> Network:
        """Return the network of one task of a group."""

    def line_of(self, group: str) -> TaskLine:
        """Return the line of the tensor of a group over tasks."""


#: A function as `gather`.
Gather = Callable[[TaskOwner, Sequence[Hashable], str], list[Tensor]]


class TaskRows(BatchTensors):
    """The tasks that the rows of one context chose. Their tensors are those that the parameters have when a
    forward begins, since an optimiser changes them within a context.

    Args:
        owner: the adapter.
        chosen: the task of each row; None stands for a row that is not updated.
        gather: `gather`, or a function that does the same.

    Attributes:
        names: the task of each row of the layout.
    """

    def __init__(self, owner: TaskOwner, chosen: Chosen, gather: Gather) -> None:
        super().__init__({}, chosen.layout, chosen.shape)
        self.trains = True  # so that every forward makes its pairs
        self.names: Sequence[Hashable] = chosen.names
        self._owner = owner
        self._gather = gather

    def tensors_of(self, group: str) -> list[Tensor]:
        """Return the parameters of a group: the own ones stacked over the rows, and the common ones."""
        return self._gather(self._owner, self.names, group)

    def check(self, x: Tensor, path: str, running: object) -> None:
        """Check that an input has the rows or tokens of the batch; one task for all fits every input."""
        if self._shape != (1,):
            super().check(x, path, running)


def gather(owner: TaskOwner, names: Sequence[Hashable], group: str) -> list[Tensor]:
    """Take the parameters of a group from its networks, in the order of the line.

    Args:
        owner: the adapter.
        names: the task of each row; None stands for a row that is not updated.
        group: the name of the group.

    Returns:
        The own parameters of the tasks, stacked over the rows, and those that all tasks have in common.
    """
    like = owner.network_of(group, owner.tasks[0])
    stored = {task: owner.network_of(group, task).stored for task in owner.tasks}
    # Processes reduce the gradients of the same parameters, whatever tasks the rows of each have: FSDP2
    # would add up those of different ones. Elsewhere a task that no row uses has no gradient.
    unused = [task for task in owner.tasks if task not in names] if processes() > 1 else []
    found = []
    for k, (is_common, tensor) in enumerate(zip(owner.line_of(group).common, like.stored)):
        if is_common:
            found.append(tensor)
            continue
        nothing = torch.zeros_like(tensor)
        rows = [nothing if task is None else stored[task][k] for task in names]  # type: ignore[index]
        zeros = [stored[task][k] for task in unused]
        found.append(torch.stack([*rows, *zeros])[: len(rows)])
    return found


class CurrentTasks(CurrentBatch):
    """Gives the hooks of an adapter with tasks the rows of the present context, or those of the default task.

    Args:
        sources: the pair source of each group.
        owner: the adapter.
    """

    def __init__(self, sources: Sequence[PairSource], owner: TaskOwner) -> None:
        super().__init__(sources)
        self.scope = owner.scope
        self._owner = owner
        self._rows_of_default: TaskRows | None = None
        self._gather = not_compiled(gather)  # else the compiler would make code for each name

    def get(self) -> BatchTensors | None:
        """Return the rows; None while the adapter adds no update.

        Raises:
            ValueError: no task is chosen.
        """
        if not self._owner.adds_update:
            return None
        found = super().get()
        if found is None:
            raise ValueError(why_none(self._owner))
        return found

    def rows(self, chosen: Chosen) -> TaskRows:
        """Make the rows of a context.

        Args:
            chosen: the task of each row.
        """
        return TaskRows(self._owner, chosen, self._gather)

    def chosen(self) -> set[Hashable]:
        """Return the tasks that are chosen now."""
        rows = self._open() or self._default()
        return set(rows.names) if isinstance(rows, TaskRows) else set()

    def _default(self) -> BatchTensors | None:
        name, rows = self._owner.default, self._rows_of_default
        if name is None:
            return None
        if rows is None or rows.names != [name]:
            self._rows_of_default = rows = self.rows(Chosen.one(name))
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "owner": self._owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        CurrentBatch.__init__(self, state["sources"])  # the owner may not be complete yet
        self.scope, self._owner = state["scope"], state["owner"]
        self._rows_of_default = None
        self._gather = not_compiled(gather)


def why_none(owner: TaskOwner) -> str:
    """Say that a task has to be chosen, and how: on a model, or of an adapter that was only read."""
    first = owner.tasks[0]
    names = ", ".join(map(repr, owner.tasks))
    several = f"adapter {owner.name!r} has the tasks {names}, and not one is chosen"
    if owner.is_on_model:
        return (
            f"{several}: stay within `with adapter.using({first!r}):`, or set adapter.default = {first!r}; "
            f"what reads or writes one adapter takes task={first!r}"
        )
    return f"{several}: take one, with lortalib.nn.read(folder, task={first!r}) or adapter.task({first!r})"
