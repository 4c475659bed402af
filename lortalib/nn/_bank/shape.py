"""Defines the shape of a bank's adapters, and refuses tensors and adapters of another one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ..._kinds import LIST
from ...decomp import Legs
from .._group import Group
from .._plan import Plan
from .shared import SharedParameters, several_values

#: A mapping from the name of each group to its tensors, each with a leading axis of adapters.
Stacked = dict[str, list[Tensor]]


class BankShape:
    """The groups, lines and sizes that every adapter of a bank has, and the dtype of its tensors.

    Args:
        plan: the groups and networks of one adapter.
        shared: the parameters that the bank's adapters share.
        dtype: the dtype of the bank's tensors.
        device: the device of the bank's tensors.

    Attributes:
        legs: the line of each group's network by the name of the group.
        keys: for each own parameter of a group a key, which is the same for all that are one parameter.
        shapes: the shapes of an adapter's own tensors, likewise.
    """

    def __init__(
        self, plan: Plan, shared: SharedParameters, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._dtype = dtype
        self._device = device
        self._groups = {group.name: group for group in plan.groups}
        self.legs = {name: plan.networks[name].legs for name in self._groups}
        own = {name: shared.own(name, plan.networks[name].stored) for name in self._groups}
        self.keys = {name: [id(t) for t in tensors] for name, tensors in own.items()}
        self.shapes = {name: [tuple(t.shape) for t in tensors] for name, tensors in own.items()}

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
                if name != group and not widened(value).equal(widened(one.to(value))):
                    raise ValueError(several_values(label, group))
            for k, one in zip(own, given):
                other = given[own.index(legs.holders[k])]
                if one is other or widened(one).equal(widened(other)):
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
        wide = widened(value)
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


def widened(tensor: Tensor) -> Tensor:
    """Convert a tensor to a dtype that torch can compute with."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
