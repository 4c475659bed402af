"""The network: parameters with named legs, and the three operations that every format shares."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ._cut import Cut, CutPlan, make_cut_plan
from ._einsum import contract
from ._legs import Legs, LegsError, Term
from ._modes import Shape

_FAR = ("head", "out")


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
        """How many numbers the parameters hold.

        Args:
            trainable_only: whether parameters marked ``(frozen)`` are left out.

        Example:
            >>> from lortalib.decomp import cp
            >>> cp((6, 8, 4, 64, 16), rank=2).count()  # 2 * (6 + 8 + 4 + 64 + 16)
            196
        """
        return sum(
            tensor.numel()
            for term, tensor in zip(self.legs.terms, self.tensors)
            if not (trainable_only and term.frozen)
        )

    def dense(self) -> Tensor:
        """The full tensor; what every other operation is held against.

        Returns:
            A tensor of shape `shape`, its axes in the order of `modes`, in the dtype and on the
            device of the parameters. Differentiable; costs its full size in memory.

        Example:
            >>> from lortalib.decomp import cp
            >>> cp({"layer": 6, "in": 64, "out": 16}, rank=2).dense().shape
            torch.Size([6, 64, 16])
        """
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

        Example:
            >>> from lortalib.decomp import cp
            >>> net = cp((6, 8, 4, 64, 16), rank=2)
            >>> net.select(layer=3, matrix=0).shape
            Shape(head=8, in=64, out=16)
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
        return NetworkView(legs, tensors, tuple(mode for mode in self.modes if mode not in index))

    def index_select(self, mode: str, positions: Tensor) -> TensorNetwork:
        """Keep some positions of a mode, in the order given; positions may repeat.

        Args:
            mode: one of `modes`.
            positions: one axis of integers, on the device of the parameters.

        Returns:
            A network over the same modes (gradients reach the parameters).

        Raises:
            KeyError: a name that is no mode of this network.
            IndexError: a position outside the mode.

        Example:
            >>> import torch
            >>> from lortalib.decomp import cp
            >>> net = cp({"layer": 6, "in": 64, "out": 16}, rank=2)
            >>> net.index_select("layer", torch.tensor([5, 0])).shape
            Shape(layer=2, in=64, out=16)
        """
        if mode not in self.modes:
            raise KeyError(
                f"cannot take from {mode!r}: the modes of this network are {', '.join(self.modes)}"
            )
        return NetworkView(
            self.legs,
            [
                tensor.index_select(term.legs.index(mode), positions)
                if mode in term.legs
                else tensor
                for term, tensor in zip(self.legs.terms, self.tensors)
            ],
            self.modes,
        )

    def mode_dot(self, matrix: Tensor, mode: str) -> TensorNetwork:
        """Multiply the tensor by a matrix along one mode (the n-mode product).

        The matrix becomes one more parameter of the network, so nothing dense is formed.

        Args:
            matrix: (new size, size of the mode).
            mode: one of `modes`.

        Returns:
            A network whose mode has the new size; its axes are those of this one.

        Raises:
            KeyError: a name that is no mode of this network.
            ValueError: a matrix of another shape.

        Example:
            >>> import torch
            >>> from lortalib.decomp import cp
            >>> means = torch.full((1, 4), 0.25)
            >>> net = cp({"head": 4, "in": 5, "out": 3}, rank=2).mode_dot(means, "head")
            >>> net.shape
            Shape(head=1, in=5, out=3)
        """
        if mode not in self.modes:
            raise KeyError(
                f"cannot multiply along {mode!r}: the modes of this network are "
                f"{', '.join(self.modes)}"
            )
        if matrix.ndim != 2 or matrix.shape[1] != self.sizes[mode]:
            raise ValueError(
                f"to multiply along {mode!r} of size {self.sizes[mode]}, a matrix of shape (new "
                f"size, {self.sizes[mode]}) is needed; found {tuple(matrix.shape)}"
            )
        bond = mode
        while bond in self.sizes:
            bond += "_"
        terms = [
            Term(tuple(bond if leg == mode else leg for leg in term.legs), term.frozen, term.zero)
            for term in self.legs.terms
        ]
        legs = Legs((*terms, Term((mode, bond), frozen=True)))
        return NetworkView(legs, [*self.tensors, matrix], self.modes)

    def cut(self, *batch_modes: str) -> Cut:
        """Split the network into ordinary low-rank pairs, exactly and differentiably.

        The network is divided where the bonds that cross have the smallest product p; A holds the
        side of ``in``. Besides ``in``, ``out`` and perhaps ``head`` only the modes ``batch_modes`` may be
        left: all their slices are cut at once.

        Args:
            over: modes that stay as leading axes, in this order; none gives one pair.

        Returns:
            `Cut`: A ``(*over, p, in)`` and B ``(*over, head*out, p)``, with ``B @ A`` the slices as
            (head*out, in) matrices. Where one side does not depend on a mode of ``batch_modes``, it has size
            1 there and broadcasts.

        Raises:
            LegsError: other modes are left, or ``in``, ``out`` or one of ``batch_modes`` is missing.

        Example:
            >>> from lortalib.decomp import cp
            >>> a, b = cp((6, 8, 4, 64, 16), rank=2).cut("layer", "matrix")
            >>> a.shape, b.shape
            (torch.Size([1, 1, 2, 64]), torch.Size([6, 4, 128, 2]))
        """
        return self.cut_plan(*batch_modes).cut(self.tensors)

    def cut_plan(self, *batch_modes: str) -> CutPlan:
        """Where `cut` divides the network, and in which order it contracts the two sides.

        Args:
            over: as for `cut`.

        Returns:
            `CutPlan`; ``plan.partition`` has the positions of the parameters on the side of
            ``in``, of those on the other side, and the bonds that cross.

        Raises:
            LegsError: as `cut`.
        """
        self._check_cut(batch_modes)
        out_side = tuple(mode for mode in _FAR if mode in self.modes)
        plan: CutPlan = make_cut_plan(self._terms, tuple(self.sizes.items()), out_side, batch_modes)
        return plan

    def _check_cut(self, batch_modes: tuple[str, ...]) -> None:
        absent = [mode for mode in batch_modes if mode not in self.modes or mode in ("in", *_FAR)]
        if absent or len(set(batch_modes)) < len(batch_modes):
            raise LegsError(
                f"cannot cut over {', '.join(map(repr, batch_modes))}: these are to be different modes of "
                f"the network, which has {', '.join(self.modes)}, other than in, head and out"
            )
        others = [mode for mode in self.modes if mode not in ("in", *_FAR, *batch_modes)]
        if others or "in" not in self.modes or "out" not in self.modes:
            names = ", ".join(f"{mode}=0" for mode in others)
            every = ", ".join(repr(mode) for mode in (*batch_modes, *others))
            raise LegsError(
                "a cut needs the modes in, out and optionally head, and no others; "
                f"this network has {', '.join(self.modes)}."
                + f" Select first: net.select({names}).cut(), or cut them all: net.cut({every})"
                * bool(others)
            )

    def to_tensorly(self) -> Any:
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


class NetworkView(TensorNetwork):
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
        >>> import torch
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
