"""Reads the sources of a bank (adapters, folders, tensors) into tensors that it can store."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from os import PathLike
from typing import NamedTuple, Union

import torch
from torch import Tensor

from ..._kinds import LIST
from ...decomp import Legs
from .._adapter import Adapter
from .._anatomy import BlockRule
from .._files import read_adapter
from .._group import Group
from .._plan import Plan
from .home import BankHome
from .shared import SharedParameters, several_values

#: A source for `Bank.add`: an adapter, its folder, or the tensors of each group in the order of the line.
Source = Union[Adapter, str, "PathLike[str]", Mapping[str, Sequence[Tensor]]]

#: A mapping from the name of each group to its tensors, each with a leading axis of adapters.
Stacked = dict[str, list[Tensor]]


class Reading(NamedTuple):
    """What was read of some adapters.

    Attributes:
        own: a mapping from the name of each group to the adapters' own tensors.
        shared: the same for the shared tensors; None if the source has none.
    """

    own: Stacked
    shared: Stacked | None


class SourceReader:
    """Reads sources into tensors of the shape, dtype and device of one bank; changes nothing.

    Attributes:
        legs: the line of each group's network, by the name of the group.
        keys: for each own parameter of a group a key, which is the same for all that are one parameter.
        shapes: their shapes.

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
        self._home = home
        self._shared = shared
        self._rules = rules
        self._dtype = dtype
        self._device = device
        self._groups = {group.name: group for group in plan.groups}
        self._alpha = plan.config.alpha
        self.legs = {name: plan.networks[name].legs for name in self._groups}
        own = {name: shared.own(name, plan.networks[name].stored) for name in self._groups}
        self.keys = {name: [id(t) for t in tensors] for name, tensors in own.items()}
        self.shapes = {name: [tuple(t.shape) for t in tensors] for name, tensors in own.items()}

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
        # One that several networks have in common is scaled only if there is no other.
        all_groups = [key for keys in self.keys.values() for key in set(keys)]
        common = {k for k, key in zip(own, self.keys[group]) if all_groups.count(key) > 1}
        scaled = min((holders[k] for k in own), key=lambda k: (holders.count(k), k in common, k))
        uses = holders.count(scaled)
        if uses > 1 and factor < 0:
            raise ValueError(
                f"the parameters of the group {group!r} ({self.legs[group]}) are all used {uses} times, so "
                "none can take a negative scaling; make a bank with the alpha of the adapter"
            )
        root = factor if uses == 1 else factor ** (1 / uses)
        pairs = zip(own, tensors)
        return [_wide(t) * root if holders[k] == scaled else t for k, t in pairs]

    def _own_terms(self, group: str) -> list[int]:
        """List the positions of the terms that every adapter has of its own."""
        return [k for k, term in enumerate(self.legs[group].terms) if not term.shared]

    def check_alike(self, label: str, groups: Sequence[Group], legs: Mapping[str, Legs]) -> None:
        """Refuse an adapter or a bank whose tensors have another meaning than this bank's.

        Args:
            label: a noun for the source, for the error message.
            groups: its groups.
            legs: the legs of its networks, by the name of the group.

        Raises:
            ValueError: its groups update other projections, or its networks have other legs.
        """
        for group in groups:
            own = self._groups.get(group.name)
            if own is None or group.meaning != own.meaning:
                raise ValueError(
                    f"{label} does not fit the bank: its group {group.name!r} adapts other projections; "
                    "make the bank with the adapter's targets, layers, gqa and acts_on"
                )
            if legs[group.name].unmarked != self.legs[group.name].unmarked:
                raise ValueError(
                    f"{label} does not fit the bank: its group {group.name!r} has the legs\n"
                    f"    {legs[group.name]}\nand the bank's\n    {self.legs[group.name]}"
                )

    def _of_adapter(self, name: Hashable, adapter: Adapter) -> tuple[Stacked, Stacked | None]:
        paths = adapter.trained_modules.paths
        if paths:
            raise ValueError(
                f"adapter {name!r} trains whole modules ({', '.join(paths)}), of which the rows of one "
                "batch cannot have different values"
            )
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

    def check_shapes(
        self, label: str, tensors: Mapping[str, Sequence[Tensor]], lead: tuple[int, ...]
    ) -> None:
        """Refuse tensors that are not those of an adapter, with some leading axes.

        Args:
            label: how an error message begins.
            tensors: a mapping from the name of each group to its tensors.
            lead: the leading axes.

        Raises:
            TypeError: a group without a list of tensors.
            ValueError: other groups, shapes or kinds of tensors.
        """
        unknown = [group for group in tensors if group not in self.shapes]
        if unknown:
            raise ValueError(
                f"{label}: it has the groups {list(self.shapes)}; found {unknown[0]!r} among those given"
            )
        for group, shapes in self.shapes.items():
            given = tensors.get(group, ())
            LIST.check(f"{label}: its group {group!r}", given)
            wanted = [(*lead, *shape) for shape in shapes]
            found = [tuple(getattr(tensor, "shape", ())) for tensor in given]
            if found != wanted:
                raise ValueError(
                    f"{label}: its group {group!r} ({self.legs[group]}) has tensors of the shapes "
                    f"{wanted}; found {found or f'none among the groups {list(tensors)}'}"
                )
            for tensor in given:
                if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.is_complex():
                    what = type(tensor).__name__
                    if isinstance(tensor, Tensor):
                        what = f"one on {tensor.device} of {tensor.dtype}"
                    raise ValueError(
                        f"{label}: its group {group!r} takes tensors of real numbers; found {what}"
                    )
        self._check_repeated(label, tensors)

    def _check_repeated(self, label: str, tensors: Mapping[str, Sequence[Tensor]]) -> None:
        """Refuse different tensors for parameters that are one tensor: tied, or hashed from one vector."""
        first: dict[
            int, tuple[str, Tensor]
        ] = {}  # of each parameter, which networks can have in common
        for group, given in tensors.items():
            legs, own = self.legs[group], self._own_terms(group)
            for key, one in zip(self.keys[group], given):
                name, value = first.setdefault(key, (group, one))
                if name != group and not _wide(value).equal(_wide(one.to(value))):
                    raise ValueError(several_values(label, group))
            for k, one in zip(own, given):
                other = given[own.index(legs.holders[k])]
                if one is other or _wide(one).equal(_wide(other)):
                    continue
                vector = legs.terms[legs.holders[k]].of
                what = (
                    f"hashed from {vector!r} have one vector" if vector else "tied have one tensor"
                )
                raise ValueError(
                    f"{label}: the parameters of its group {group!r} ({legs}) that are {what}; found "
                    "different ones"
                )

    def _cast(self, names: Sequence[Hashable], tensors: Mapping[str, Sequence[Tensor]]) -> Stacked:
        """Bring the tensors to the bank's dtype and device."""
        with torch.no_grad():
            for group, values in tensors.items():
                for value in values:
                    self._check_range(names, group, value)
            return {
                group: [value.to(self._device, self._dtype) for value in values]
                for group, values in tensors.items()
            }

    def _check_range(self, names: Sequence[Hashable], group: str, value: Tensor) -> None:
        """Refuse values that the bank's dtype cannot hold; some casts would clip them silently."""
        largest = torch.finfo(self._dtype).max
        wide = _wide(value)
        if not wide.numel():
            return
        low, high = (bound.item() for bound in wide.aminmax())
        if -largest <= low and high <= largest:  # false for NaN too
            return
        fits = (wide.reshape(len(wide), -1).double().abs() <= largest).all(1)
        name = names[int(fits.logical_not().nonzero()[0])]
        raise ValueError(
            f"adapter {name!r} holds NaN or infinity in group {group!r}, or values beyond {largest:g}, "
            f"the largest in {self._dtype}; a bank of a wider dtype holds larger values"
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


def _wide(tensor: Tensor) -> Tensor:
    """Convert a tensor to a dtype that torch can compute with."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
