"""Reads the sources of a bank (adapters, folders, tensors) into tensors that it can store."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from os import PathLike
from typing import NamedTuple, Union

import torch
from torch import Tensor

from .._adapter import Adapter
from .._anatomy import BlockRule
from .._files import read_adapter
from .._plan import Plan
from .._task_lines import TASK, are_common, line_of_one_task
from .home import BankHome
from .shape import BankShape, Stacked, widened
from .shared import SharedParameters

#: A source for `Bank.add`: an adapter, its folder, or the tensors of each group in the order of the line.
Source = Union[Adapter, str, "PathLike[str]", Mapping[str, Sequence[Tensor]]]


class Reading(NamedTuple):
    """What was read of some adapters.

    Attributes:
        own: a mapping from the name of each group to the adapters' own tensors.
        shared: the same for the shared tensors; None if the source has none.
    """

    own: Stacked
    shared: Stacked | None


class SourceReader(BankShape):
    """Reads sources into tensors of the shape, dtype and device of one bank; changes nothing.

    Args:
        home: the home of the bank, to whose model adapters from files are fitted.
        plan: the groups and networks of one adapter, and the bank's alpha.
        shared: the parameters that the bank's adapters share.
        rules: as for `bank`.
        dtype: the dtype of the bank's tensors.
        device: the device of the bank's tensors.
    """

    def __init__(
        self,
        home: BankHome,
        plan: Plan,
        shared: SharedParameters,
        rules: BlockRule | Sequence[BlockRule],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(plan, shared, dtype, device)
        self._home = home
        self._shared = shared
        self._rules = rules
        self._alpha = plan.config.alpha

    def read(self, name: Hashable, source: Source) -> Reading:
        """Read one adapter.

        Args:
            name: its name in the bank.
            source: an adapter, its folder, or tensors without the scaling by alpha.

        Returns:
            Its own tensors without the scaling by alpha, with a leading axis of 1; and its shared ones.

        Raises:
            ValueError: the name is None, or the source does not fit or cannot be stored.
            TypeError: a source of another type.
        """
        check_name(name)
        if isinstance(source, (str, PathLike)):
            source = read_adapter(self._home.model, source, rules=self._rules)
        shared = None
        if isinstance(source, Adapter):
            source, shared = self._of_adapter(name, source)
        if not isinstance(source, Mapping):
            raise TypeError(
                f"adapter {name!r} is to be an Adapter, the folder of one, or for each group by name its "
                f"tensors; found {type(source).__name__}"
            )
        label = f"adapter {name!r} does not fit the bank"
        self.check_shapes(label, source, ())
        one = {group: [tensor[None] for tensor in tensors] for group, tensors in source.items()}
        return Reading(self._cast([name], one), shared)

    def read_all(self, sources: Mapping[Hashable, Source]) -> Reading:
        """Read several adapters, which have one set of shared parameters; see `read`.

        Returns:
            Their own tensors, each with a leading axis of adapters; and the shared ones.
        """
        read = {name: self.read(name, source) for name, source in sources.items()}
        if len(read) == 1:
            return next(iter(read.values()))
        found = [(name, each.shared) for name, each in read.items() if each.shared is not None]
        for name, shared in found[1:]:
            _check_same(found[0], (name, shared))
        own = {
            group: [torch.cat(each) for each in zip(*(one.own[group] for one in read.values()))]
            for group in self.shapes
        }
        return Reading(own, found[0][1] if found else None)

    def read_tasks(self, adapter: Adapter) -> Reading:
        """Read the tasks of an adapter, each as an adapter; see `read`.

        Args:
            adapter: an adapter with tasks.

        Returns:
            Their own tensors, each with a leading axis of tasks; and the shared ones.

        Raises:
            ValueError: a task's own parameter is one that the bank's adapters share.
        """
        label, number = f"adapter {adapter.name!r}", len(adapter.tasks)
        _refuse_modules(label, adapter)
        tensors = {group.name: adapter.tensor(group) for group in adapter.groups}
        legs = {name: line_of_one_task(tensor.legs) for name, tensor in tensors.items()}
        self.check_alike(label, adapter.groups, legs)
        own: dict[str, list[Tensor]] = {}
        shared: dict[str, list[Tensor]] = {}
        for name, tensor in tensors.items():
            own[name], shared[name] = [], []
            stored = zip(tensor.legs.terms, are_common(tensor.legs), tensor.stored)
            for mark, (term, is_common, each) in zip(self.legs[name].terms, stored):
                value = each.detach()
                if not mark.shared:
                    value = value[None] if is_common else value.movedim(term.legs.index(TASK), 0)
                    own[name].append(value.expand(number, *value.shape[1:]))
                elif is_common:
                    shared[name].append(value)
                else:
                    raise ValueError(
                        f"{label} does not fit the bank: each of its tasks has a ({term}) of its own, which "
                        f"the adapters of the bank share, in\n    {self.legs[name]}"
                    )
        if self._shared:
            self._shared.check_fits(shared, label)
        stacked = self.read_stacked(adapter.tasks, self.scaled(own, adapter.scaling))
        return Reading(stacked, shared if self._shared else None)

    def read_stacked(
        self, names: Sequence[Hashable], tensors: Mapping[str, Sequence[Tensor]]
    ) -> Stacked:
        """Read many adapters whose tensors are already stacked.

        Args:
            names: their names in the bank.
            tensors: a mapping from the name of each group to its tensors without the scaling by alpha,
                each with a leading axis as long as ``names``.

        Raises:
            ValueError: a name is None, or the tensors do not fit or cannot be stored.
        """
        for name in names:
            check_name(name)
        self.check_shapes("the tensors do not fit the bank", tensors, (len(names),))
        return self._cast(names, tensors)

    def scaled(
        self, tensors: Mapping[str, Sequence[Tensor]], scaling: float
    ) -> dict[str, list[Tensor]]:
        """Rescale an adapter's own tensors, so that the bank's alpha gives the update that ``scaling`` gave.

        Raises:
            ValueError: every tensor is used several times, and the two scalings have different signs.
        """
        factor = scaling / self._alpha
        if factor == 1:
            return {group: list(values) for group, values in tensors.items()}
        return {group: self._rescaled(group, values, factor) for group, values in tensors.items()}

    def _rescaled(self, group: str, tensors: Sequence[Tensor], factor: float) -> list[Tensor]:
        """Multiply a network by a factor, by the tensor that the fewest terms use."""
        holders = self.legs[group].holders
        own = self._own_terms(group)
        # All groups have one line, so networks that have a parameter in common scale it alike.
        scaled = min((holders[k] for k in own), key=lambda k: (holders.count(k), k))
        uses = holders.count(scaled)
        if uses > 1 and factor < 0:
            raise ValueError(
                f"the parameters of the group {group!r} ({self.legs[group]}) are all used {uses} times, so "
                "none can take a negative scaling; make a bank with the alpha of the adapter"
            )
        root = factor if uses == 1 else factor ** (1 / uses)
        pairs = zip(own, tensors)
        return [widened(t) * root if holders[k] == scaled else t for k, t in pairs]

    def _of_adapter(self, name: Hashable, adapter: Adapter) -> tuple[Stacked, Stacked | None]:
        _refuse_modules(f"adapter {name!r}", adapter)
        networks = {group.name: adapter.network(group) for group in adapter.groups}
        legs = {group: network.legs for group, network in networks.items()}
        self.check_alike(f"adapter {name!r}", adapter.groups, legs)
        stored = {
            group: [tensor.detach() for tensor in network.stored]
            for group, network in networks.items()
        }
        own = {group: self._shared.own(group, tensors) for group, tensors in stored.items()}
        if not self._shared:
            return self.scaled(own, adapter.scaling), None
        shared = {group: self._shared.shared(group, tensors) for group, tensors in stored.items()}
        self._shared.check_fits(shared, f"adapter {name!r}")
        return self.scaled(own, adapter.scaling), shared


def _refuse_modules(label: str, adapter: Adapter) -> None:
    """Refuse an adapter with modules that train as a whole."""
    paths = adapter.trained_modules.paths
    if paths:
        raise ValueError(
            f"{label} trains whole modules ({', '.join(paths)}), of which the rows of one "
            "batch cannot have different values"
        )


def _check_same(one: tuple[Hashable, Stacked], other: tuple[Hashable, Stacked]) -> None:
    """Refuse two adapters with different shared parameters."""
    for group, tensors in one[1].items():
        for a, b in zip(tensors, other[1][group]):
            if not torch.equal(a, b.to(a)):
                raise ValueError(
                    f"adapters {one[0]!r} and {other[0]!r} have different shared parameters in group "
                    f"{group!r}, so one bank cannot hold both"
                )


def check_name(name: Hashable) -> None:
    """Refuse None as a name.

    Raises:
        ValueError: the name is None.
    """
    if name is None:
        raise ValueError("None stands for rows without an adapter; give the adapter another name")
