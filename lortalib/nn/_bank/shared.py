"""Holds the parameters that all adapters of a bank share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...decomp import Legs, Network, network

#: A mapping from the name of each group to tensors in the order of its line.
Tensors = Mapping[str, Sequence[Tensor]]


class SharedParameters:
    """The parameters that all adapters of a bank share; each is held once and has no leg ``adapter``.

    Args:
        networks: the networks of one adapter, by name of the group, on any device. Their terms marked
            ``(shared)`` are shared; the parameters start with random values.
        device: the device of the parameters.
        dtype: the dtype of the bank. Shared parameters have at least float32, since they are few.

    Attributes:
        dtype: the dtype of the parameters.
        parameters: the parameters of each group by its name, in the order of the line. They do not require
            gradients unless the user says so.

    Raises:
        ValueError: a network of which an adapter has no parameter of its own.
    """

    def __init__(
        self, networks: Mapping[str, Network], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype = (
            torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32
        )
        self._marks: dict[str, list[bool]] = {}
        self.parameters: dict[str, list[nn.Parameter]] = {}
        made: dict[int, nn.Parameter] = {}  # one that several terms or networks use is held once
        for name, net in networks.items():
            marks = [term.shared for term in net.legs.terms]
            if all(marks):
                raise ValueError(
                    f"all parameters of the network {name!r} are shared, so its adapters cannot differ: "
                    f"leave one unmarked, in\n    {net.legs}"
                )
            self._marks[name] = marks
            values = _random_values(net, device, dtype) if any(marks) else net.stored
            for tensor, value in zip(*(self.shared(name, each) for each in (net.stored, values))):
                if id(tensor) not in made:
                    made[id(tensor)] = nn.Parameter(value, requires_grad=False)
            self.parameters[name] = [made[id(t)] for t in self.shared(name, net.stored)]

    def __bool__(self) -> bool:
        return any(self.parameters.values())

    @property
    def distinct(self) -> list[nn.Parameter]:
        """The parameters of all groups, each once."""
        return list({id(p): p for each in self.parameters.values() for p in each}.values())

    def shared(self, group: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the shared ones among a network's tensors."""
        return [t for t, mark in zip(tensors, self._marks[group]) if mark]

    def own(self, group: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return those of a network's tensors that every adapter has of its own."""
        return [t for t, mark in zip(tensors, self._marks[group]) if not mark]

    def join(self, own: Tensors) -> dict[str, list[Tensor]]:
        """Put an adapter's own tensors and the shared parameters in the order of the line.

        Parameters that do not require gradients are copied, because a bank that is emptied can get others.
        """
        now = {id(p): p if p.requires_grad else p.detach().clone() for p in self.distinct}
        found = {}
        for group, marks in self._marks.items():
            mine, ours = iter(own[group]), (now[id(p)] for p in self.parameters[group])
            found[group] = [next(ours) if mark else next(mine) for mark in marks]
        return found

    def check_fits(self, values: Tensors, label: str) -> None:
        """Refuse values that the shared parameters cannot take.

        Args:
            values: the values by the name of the group.
            label: a noun for their source.

        Raises:
            ValueError: other shapes, a value that is not finite, or several values for one parameter.
        """
        first: dict[int, Tensor] = {}
        for group, given in values.items():
            for parameter, value in zip(self.parameters[group], given):
                if parameter.shape != value.shape:
                    raise ValueError(
                        f"{label} does not fit the bank: a shared parameter of its group {group!r} has the "
                        f"shape {tuple(value.shape)}, and the bank's {tuple(parameter.shape)}"
                    )
                if not value.to(parameter).isfinite().all():
                    raise ValueError(
                        f"{label} holds NaN or infinity in a shared parameter of group {group!r}"
                    )
                if not torch.equal(
                    first.setdefault(id(parameter), value), value.to(first[id(parameter)])
                ):
                    raise ValueError(several_values(label, group))

    def check_equal(self, values: Tensors, label: str) -> None:
        """Refuse values that differ from the shared parameters.

        Args:
            values: the values by the name of the group.
            label: a noun for their source.

        Raises:
            ValueError: they differ.
        """
        for group, given in values.items():
            for parameter, value in zip(self.parameters[group], given):
                if torch.equal(parameter, value.to(parameter)):
                    continue
                if torch.equal(parameter.to(value), value):
                    raise ValueError(
                        f"{label} has the bank's shared parameters in group {group!r} rounded to "
                        f"{value.dtype}; the bank has them in {parameter.dtype}. Train it in that dtype"
                    )
                raise ValueError(
                    f"{label} has other shared parameters in group {group!r} than the adapters of the "
                    "bank. Train it on those of the bank, as by apply(..., shared=bank), or put it into "
                    "a bank of its own"
                )

    @contextmanager
    def changed(self, values: Tensors) -> Iterator[None]:
        """Set the shared parameters to values; if the context raises, they are what they were."""
        own = {id(p): p for group in values for p in self.parameters[group]}.values()
        with torch.no_grad():
            before = [p.clone() for p in own]
            try:
                for group, given in values.items():
                    for parameter, value in zip(self.parameters[group], given):
                        parameter.copy_(value)
                yield
            except BaseException:
                for parameter, value in zip(own, before):
                    parameter.copy_(value)
                raise


def several_values(label: str, group: str) -> str:
    """Say that networks have different tensors where the bank has one parameter for all of them."""
    return (
        f"{label}: the networks of the bank have one parameter for in, as by share_residual=True; found "
        f"another in group {group!r} than in a group before it. Make the bank with share_residual=False"
    )


def check_same_marks(label: str, theirs: Mapping[str, Legs], ours: Mapping[str, Legs]) -> None:
    """Refuse a bank whose adapters share other parameters.

    Args:
        label: a noun for the other bank.
        theirs: the legs of its networks, by the name of the group.
        ours: those of this bank.

    Raises:
        ValueError: the marks ``(shared)`` differ.
    """
    for group, own in ours.items():
        if [t.shared for t in theirs[group].terms] != [t.shared for t in own.terms]:
            raise ValueError(
                f"{label} does not fit the bank: its group {group!r} shares other parameters, as in\n"
                f"    {theirs[group]}\nand the bank's\n    {own}\nMake the bank with the same shared="
            )


def _random_values(like: Network, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Draw the parameters of a network like another one."""
    ranks = {**like.ranks, **like.vectors}
    with torch.inference_mode(False):  # parameters outlive the mode in which they are made
        drawn = network(like.legs, like.shape, ranks, init="normal", device=device, dtype=dtype)
        return [tensor.detach() for tensor in drawn.stored]
