"""The network: parameters with named legs, and the three operations that every format shares."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ._contract import cheapest_cut, contract
from ._legs import Legs, LegsError
from ._modes import Shape

if TYPE_CHECKING:
    from ._tensorly import TensorLyObject

_FAR = ("head", "out")


class Cut(NamedTuple):
    """A low-rank pair: ``B @ A`` is the (head*out, in) slice of the tensor.

    Attributes:
        A: (p, in).
        B: (head*out, p); row ``h*out + j`` is component j of head h.
    """

    A: Tensor
    B: Tensor


class TensorNetwork(ABC):
    """What every network can do, whoever owns its parameters; `Network` says it in full.

    Attributes:
        legs: the parsed line.
        modes: the modes, in the order of the axes of `dense`.
        sizes: the size of every leg.
        names: a name for each parameter.
    """

    legs: Legs
    modes: tuple[str, ...]
    sizes: dict[str, int]
    names: tuple[str, ...]

    def _describe(self, legs: Legs, sizes: dict[str, int], modes: tuple[str, ...]) -> None:
        self.legs, self.sizes, self.modes = legs, sizes, modes
        self._terms = tuple(term.legs for term in legs.terms)

    @property
    def shape(self) -> Shape:
        """The modes and their sizes, in the order of the axes of `dense`."""
        return Shape({mode: self.sizes[mode] for mode in self.modes})

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters, in the order of the line."""
        raise NotImplementedError

    @property
    def ranks(self) -> dict[str, int]:
        """Size of each bond, in order of first appearance."""
        return {bond: self.sizes[bond] for bond in self.legs.bonds(self.modes)}

    def count(self, trainable_only: bool = True) -> int:
        """How many numbers the parameters hold; frozen ones only if ``trainable_only=False``."""
        return sum(
            tensor.numel()
            for term, tensor in zip(self.legs.terms, self.tensors)
            if not (trainable_only and term.frozen)
        )

    def dense(self) -> Tensor:
        """The full tensor, axes in the order of `modes`. Differentiable; costs its full size."""
        return contract(self._terms, self.tensors, self.modes, self.sizes)

    def select(self, **index: int) -> TensorNetwork:
        """Fix some modes at an index each; the result is a network over the remaining modes.

        Args:
            index: mode name and position, for instance ``layer=3, matrix=0``; negative positions
                count from the end.

        Returns:
            A network that refers to slices of these parameters (nothing is copied; gradients
            reach the parameters).

        Raises:
            KeyError: a name that is no mode of this network.
            IndexError: a position outside the mode.
            TypeError: a position that is no integer.
        """
        index = {mode: operator.index(position) for mode, position in index.items()}
        for mode, position in index.items():
            if mode not in self.modes:
                raise KeyError(
                    f"cannot select {mode!r}: the modes of this network are {', '.join(self.modes)}"
                )
            if not -self.sizes[mode] <= position < self.sizes[mode]:
                raise IndexError(
                    f"{mode}={position} is outside the mode {mode!r} of size {self.sizes[mode]}"
                )
        tensors = [
            tensor[tuple(index.get(leg, slice(None)) for leg in term.legs)]
            for term, tensor in zip(self.legs.terms, self.tensors)
        ]
        legs = Legs(tuple(term.without(index) for term in self.legs.terms))
        return View(legs, tensors, tuple(mode for mode in self.modes if mode not in index))

    def cut(self) -> Cut:
        """Split a selected network into an ordinary low-rank pair, exactly and differentiably.

        Only the modes ``in``, ``out`` and perhaps ``head`` may be left. The network is divided
        where the bonds that cross have the smallest product p; A holds the side of ``in``.

        Returns:
            `Cut`: A (p, in) and B (head*out, p), with ``B @ A`` the slice as a (head*out, in)
            matrix.

        Raises:
            LegsError: other modes are left, or ``in`` or ``out`` is missing.
        """
        far = tuple(mode for mode in _FAR if mode in self.modes)
        others = [mode for mode in self.modes if mode not in ("in", *_FAR)]
        if others or "in" not in self.modes or "out" not in self.modes:
            raise LegsError(
                "a cut needs the modes in, out and optionally head, and no others; "
                f"this network has {', '.join(self.modes)}."
                + f" Select first: net.select({', '.join(f'{m}=0' for m in others)}).cut()"
                * bool(others)
            )
        near_side, far_side, bonds = cheapest_cut(self._terms, tuple(self.sizes.items()), far)
        rank = math.prod([self.sizes[bond] for bond in bonds])
        tensors = self.tensors

        def side(positions: tuple[int, ...], output: tuple[str, ...]) -> Tensor:
            terms = tuple(self._terms[k] for k in positions)
            return contract(terms, [tensors[k] for k in positions], output, self.sizes)

        if near_side:
            a = side(near_side, (*bonds, "in")).reshape(rank, self.sizes["in"])
        else:
            a = torch.eye(rank, dtype=tensors[0].dtype, device=tensors[0].device)
        return Cut(a, side(far_side, (*far, *bonds)).reshape(-1, rank))

    def to_tensorly(self) -> TensorLyObject:
        """The network as a TensorLy object with live autograd; see `lortalib.decomp.to_tensorly`."""
        from ._tensorly import to_tensorly

        return to_tensorly(self)

    def __repr__(self) -> str:
        rows = [("parameter", "legs", "sizes", "numbers")]
        for name, term, tensor in zip(self.names, self.legs.terms, self.tensors):
            sizes = " x ".join(map(str, tensor.shape))
            rows.append((name, str(term), sizes, f"{tensor.numel():,}"))
        rows.append(("total", "", "", f"{self.count(trainable_only=False):,}"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = []
        for row in rows:
            left = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths))
            lines.append(f"  {left}  {row[3].rjust(widths[3])}")
        modes = ", ".join(f"{mode}={self.sizes[mode]}" for mode in self.modes)
        head = f"{type(self).__name__}({modes}): {self.count():,} trainable numbers"
        return "\n".join([head, *lines])


class View(TensorNetwork):
    """A network over slices of parameters that another network owns; see `Network.select`."""

    def __init__(self, legs: Legs, tensors: Sequence[Tensor], modes: tuple[str, ...]) -> None:
        pairs = zip(legs.terms, tensors)
        sizes = {leg: n for term, tensor in pairs for leg, n in zip(term.legs, tensor.shape)}
        self._describe(legs, sizes, modes)
        self._tensors = tuple(tensors)
        self.names = tuple("_".join(term.legs) or "scalar" for term in legs.terms)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The slices, in the order of the line."""
        return self._tensors


class Network(TensorNetwork, nn.Module):
    """A tensor stored as a network of small parameters whose axes (legs) have names.

    A leg is a mode of the tensor or a bond, which is summed over. All else follows from the line
    of legs: `dense`, `select` and `cut` are written once, for any format.

    Laws (property-tested over every registered format):

    * ``net.select(**i).dense()`` is ``net.dense()`` indexed at ``i``;
    * ``B @ A`` of `cut` is the dense slice, and p is the product of the sizes of the cut bonds;
    * gradients through `cut` and through `dense` agree.

    Args:
        legs: a line of legs, for instance ``"in r, out r, layer r"``, or one already parsed.
        tensors: one tensor for each parameter of the line; its axes are its legs. They become
            `torch.nn.Parameter` objects, trainable unless the line marks them ``(frozen)``.
        modes: the modes, in the order of the axes of `dense`.

    Raises:
        LegsError: the line is ill-formed, does not fit the modes, or the sizes disagree.

    Example:
        >>> net = Network("in r, out r", [torch.ones(3, 2), torch.ones(4, 2)], ["in", "out"])
        >>> net.dense().shape, net.count()
        (torch.Size([3, 4]), 14)
    """

    def __init__(
        self, legs: Legs | str, tensors: Sequence[Tensor], modes: Sequence[str] | Shape
    ) -> None:
        super().__init__()
        tensors, modes = tuple(tensors), tuple(modes)
        legs = Legs.parse(legs) if isinstance(legs, str) else legs
        sizes = legs.sizes([tensor.shape for tensor in tensors])
        legs.check(modes)
        self._describe(legs, sizes, modes)
        self.names = ()  # the names of attributes, this one among them, are taken
        self.names = tuple(self._parameter_names())
        for name, term, tensor in zip(self.names, self.legs.terms, tensors):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=not term.frozen))

    def _parameter_names(self) -> list[str]:
        names: list[str] = []
        for term in self.legs.terms:
            name = "_".join(term.legs)
            while name in names or hasattr(self, name):
                name += "_"
            names.append(name)
        return names

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters, in the order of the line."""
        return tuple(self._parameters[name] for name in self.names)  # type: ignore[misc]

    def forward(self) -> Tensor:
        """The same as `dense`."""
        return self.dense()

    __repr__ = TensorNetwork.__repr__
