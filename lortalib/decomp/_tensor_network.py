"""Defines the operations of every tensor network, whether or not it owns its parameters."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ._cut import OUT_MODES, Cut, CutPlan, check_cut, make_cut_plan
from ._einsum import contract
from ._factors import product
from ._legs import Legs
from ._modes import Shape
from ._notation import name_of
from ._parameter_table import describe
from ._slices import Slices


class TensorNetwork(ABC):
    """A tensor stored as a network of parameters; `Network` states the laws that its operations obey.

    Attributes:
        legs: the parsed line of legs.
        modes: the modes, in the order of the axes of `dense`.
        open_legs: the legs that are not summed over: the modes, of which a split one is there as its factors.
        sizes: the size of every leg.
        names: the name of each parameter.
    """

    legs: Legs
    modes: tuple[str, ...]
    open_legs: tuple[str, ...]
    sizes: dict[str, int]
    names: tuple[str, ...]

    def _describe(self, legs: Legs, sizes: dict[str, int], modes: tuple[str, ...]) -> None:
        self.legs, self.sizes, self.modes = legs, sizes, modes
        self.open_legs = legs.open_legs(modes)
        self._terms = tuple(term.legs for term in legs.terms)

    @property
    def shape(self) -> Shape:
        """The modes and their sizes, in the order of the axes of `dense`."""
        return Shape({mode: self._size_of(mode) for mode in self.modes})

    def _size_of(self, mode: str) -> int:
        return product([self.sizes[leg] for leg in self.legs.open_legs([mode])])

    @property
    def split(self) -> TensorNetwork:
        """The same network with the factors of its modes as modes; itself if no mode is split.

        It is an ordinary network, and its dense tensor, reshaped, is that of this one.

        Example:
            >>> from lortalib.decomp import network
            >>> net = network("in.1 a, in.2 a b, out b", {"in": (3, 4), "out": 5}, 2)
            >>> net.shape, net.split.shape
            (Shape({'in': 12, 'out': 5}), Shape({'in.1': 3, 'in.2': 4, 'out': 5}))
        """
        if self.modes == self.open_legs:
            return self
        return NetworkView(self.legs, self.tensors, self.open_legs)

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are contracted, one for each term in the order of the line."""
        raise NotImplementedError

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The parameters, one for each term; `tensors` are computed from them where a term is hashed."""
        return self.tensors

    def spread(self, stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute `tensors` from ``stored``, the tensors of `stored` or others like them."""
        return tuple(stored)

    @property
    def ranks(self) -> dict[str, int]:
        """The size of each bond, in order of first appearance."""
        return {bond: self.sizes[bond] for bond in self.legs.bonds(self.modes)}

    @property
    def vectors(self) -> dict[str, int]:
        """The size of each vector that parameters are hashed from, in order of first appearance."""
        return {vector: self.sizes[vector] for vector in self.legs.vectors}

    def count(self, trainable_only: bool = True) -> int:
        """Count the trainable parameters; a tied one counts once, a vector of hashed ones too.

        Args:
            trainable_only: whether tensors marked ``(frozen)`` are left out.

        Example:
            >>> from lortalib.decomp import cp
            >>> cp((6, 8, 4, 64, 16), rank=2).count()  # 2 * (6 + 8 + 4 + 64 + 16)
            196
        """
        terms, own = self.legs.terms, zip(self.legs.holders, self.stored)
        sizes = {k: t.numel() for k, t in own if not (trainable_only and terms[k].frozen)}
        return sum(sizes.values())

    def dense(self) -> Tensor:
        """Contract the network to the full tensor. Every other operation is tested against this one.

        Returns:
            A tensor of shape `shape`, its axes in the order of `modes`, in the dtype and on the
            device of the parameters. It is differentiable, and takes memory for every entry.

        Example:
            >>> from lortalib.decomp import cp
            >>> cp({"layer": 6, "in": 64, "out": 16}, rank=2).dense().shape
            torch.Size([6, 64, 16])
        """
        found = contract(self._terms, self.tensors, self.open_legs, self.sizes)
        return found.reshape([self._size_of(mode) for mode in self.modes])

    def select(self, index: Mapping[str, int] | None = None, /, **positions: int) -> TensorNetwork:
        """Fix some modes, each at one position; a network over the other modes remains.

        Args:
            index: a mapping from mode to position. ``in`` is a keyword of Python, so it can only be
                given here: ``net.select({"in": 0}, layer=1)``.
            positions: the same as keyword arguments, such as ``layer=3, matrix=0``. Negative positions
                count from the end.

        Returns:
            A network over slices of these parameters. Nothing is copied, and gradients reach the
            parameters.

        Raises:
            KeyError: a name that is not a mode of this network.
            IndexError: a position outside the mode.
            TypeError: a position that is not an integer, a mode given twice, an index that is not
                a mapping.

        Example:
            >>> from lortalib.decomp import cp
            >>> net = cp((6, 8, 4, 64, 16), rank=2)
            >>> net.select(layer=3, matrix=0).shape
            Shape({'head': 8, 'in': 64, 'out': 16})
            >>> net.select({"in": 5, "out": 0}, layer=3).shape
            Shape({'head': 8, 'matrix': 4})
        """
        index = self._positions({} if index is None else index, positions)
        for mode, position in index.items():
            size = self._size_of(mode)
            if not -size <= position < size:
                raise IndexError(f"{mode}={position} is outside the mode {mode!r} of size {size}")
        legs, tensors = self._slices.at(index)
        return NetworkView(legs, tensors, tuple(mode for mode in self.modes if mode not in index))

    @property
    def _slices(self) -> Slices:
        return Slices(self.legs, self.tensors, self.sizes)

    def _positions(self, index: Mapping[str, int], named: Mapping[str, int]) -> dict[str, int]:
        if not isinstance(index, Mapping):
            raise TypeError(
                f"select takes a mapping from mode to position, or keywords; found "
                f"{type(index).__name__}. Try select({{'in': 0}}, layer=1)"
            )
        twice = [mode for mode in index if mode in named]
        if twice:
            raise TypeError(f"select was given {twice[0]!r} twice, in the mapping and as a keyword")
        for mode in (*index, *named):
            if mode not in self.modes:
                raise KeyError(
                    f"cannot select {mode!r}: the modes of this network are {', '.join(self.modes)}"
                )
        found = {**index, **named}
        for mode, at in found.items():
            if not hasattr(at, "__index__"):
                raise TypeError(f"select takes one integer for {mode!r}; found {at!r}")
        return {mode: operator.index(at) for mode, at in found.items()}

    def index_select(self, mode: str, positions: Tensor) -> TensorNetwork:
        """Keep some positions of one mode, in the order given; positions may repeat.

        Args:
            mode: one of `modes`.
            positions: integers of shape (number,), on the device of the parameters.

        Returns:
            A network over the same modes. Gradients reach the parameters.

        Raises:
            KeyError: a name that is not a mode of this network.
            TypeError: positions that are no vector of integers.
            IndexError: a position outside the mode.

        Example:
            >>> import torch
            >>> from lortalib.decomp import cp
            >>> net = cp({"layer": 6, "in": 64, "out": 16}, rank=2)
            >>> net.index_select("layer", torch.tensor([5, 0])).shape
            Shape({'layer': 2, 'in': 64, 'out': 16})
        """
        if mode not in self.modes:
            raise KeyError(
                f"cannot take from {mode!r}: the modes of this network are {', '.join(self.modes)}"
            )
        legs, tensors = self._slices.taken(mode, positions, self.open_legs)
        return NetworkView(legs, tensors, self.modes)

    def mode_dot(self, matrix: Tensor, mode: str) -> TensorNetwork:
        """Multiply the tensor by a matrix or a vector along one mode (the n-mode product).

        The matrix becomes one more parameter of the network, so no dense tensor is formed.

        Args:
            matrix: (new size, size of the mode), or a vector (size of the mode).
            mode: one of `modes`.

        Returns:
            A network with the same modes, one of them with the new size; a vector sums over the mode,
            which the network then lacks.

        Raises:
            KeyError: a name that is not a mode of this network.
            ValueError: a matrix or vector of another shape.
            TypeError: no tensor, or one of another dtype or device than the parameters.
            LegsError: the network already has the largest number of legs or parameters.

        Example:
            >>> import torch
            >>> from lortalib.decomp import cp
            >>> means = torch.full((1, 4), 0.25)
            >>> net = cp({"head": 4, "in": 5, "out": 3}, rank=2).mode_dot(means, "head")
            >>> net.shape
            Shape({'head': 1, 'in': 5, 'out': 3})
        """
        if mode not in self.modes:
            raise KeyError(
                f"cannot multiply along {mode!r}: the modes of this network are "
                f"{', '.join(self.modes)}"
            )
        legs, tensors = self._slices.times(mode, matrix)
        left = self.modes if matrix.ndim == 2 else tuple(m for m in self.modes if m != mode)
        return NetworkView(legs, tensors, left)

    def cut(self, *batch_modes: str) -> Cut:
        """Split the network into ordinary low-rank pairs, exactly and differentiably.

        The network is divided where the product p of the crossing bonds is smallest. The side of ``in``
        becomes A, the other side B. The network may have no modes but ``in``, ``out``, ``head`` and
        ``batch_modes``; all slices over ``batch_modes`` are cut at once.

        Args:
            batch_modes: modes that become leading axes, in this order; without any, there is one pair.

        Returns:
            `Cut`: A ``(*batch_modes, p, in)`` and B ``(*batch_modes, head*out, p)``; ``B @ A`` are the
            slices as (head*out, in) matrices. If a side does not depend on one of ``batch_modes``, it
            has size 1 there and broadcasts.

        Raises:
            LegsError: the network has other modes, or lacks ``in``, ``out`` or one of ``batch_modes``.

        Example:
            >>> from lortalib.decomp import cp
            >>> a, b = cp((6, 8, 4, 64, 16), rank=2).cut("layer", "matrix")
            >>> a.shape, b.shape
            (torch.Size([1, 1, 2, 64]), torch.Size([6, 4, 128, 2]))
        """
        return self.cut_plan(*batch_modes).cut(self.tensors)

    def cut_plan(self, *batch_modes: str) -> CutPlan:
        """Plan where `cut` divides the network, and in which order it contracts the two sides.

        Args:
            batch_modes: as for `cut`.

        Returns:
            `CutPlan`; ``plan.partition`` has the positions of the parameters on the side of ``in``, the
            positions of all others, and the bonds that cross.

        Raises:
            LegsError: as `cut`.

        Example:
            >>> from lortalib.decomp import network
            >>> plan = network("in p, out q, p q", {"in": 64, "out": 16}, (2, 3)).cut_plan()
            >>> plan.partition.in_side, plan.partition.out_side, plan.partition.bonds, plan.rank
            ((0,), (1, 2), ('p',), 2)
        """
        check_cut(self.modes, batch_modes)
        plan: CutPlan = make_cut_plan(
            self._terms,
            tuple(self.sizes.items()),
            self.legs.open_legs(["in"]),
            self.legs.open_legs([mode for mode in OUT_MODES if mode in self.modes]),
            tuple(self.legs.open_legs([mode]) for mode in batch_modes),
        )
        return plan

    def norm(self, *, over: str | Sequence[str] = ()) -> Tensor:
        """Compute the Frobenius norm without the whole tensor; see `lortalib.decomp.norm`.

        Args:
            over: modes that get an axis of the result: the norm of every slice.

        Example:
            >>> from lortalib.decomp import cp
            >>> cp((6, 8, 4, 64, 16), rank=2, init="normal").norm(over="layer matrix").shape
            torch.Size([6, 4])
        """
        from ._inner import norm

        return norm(self, over=over)

    def to_tensorly(self) -> Any:
        """Make a TensorLy object of the network, with live autograd; see `lortalib.decomp.to_tensorly`."""
        from ._tensorly import to_tensorly

        return to_tensorly(self)

    def __repr__(self) -> str:
        return describe(self)


class NetworkView(TensorNetwork):
    """A tensor network over slices of parameters that another network owns; no term of it is hashed.

    Example:
        >>> from lortalib.decomp import cp
        >>> cp((6, 8, 4, 64, 16), rank=2).select(layer=0, matrix=1).shape
        Shape({'head': 8, 'in': 64, 'out': 16})
    """

    def __init__(self, legs: Legs, tensors: Sequence[Tensor], modes: tuple[str, ...]) -> None:
        legs, pairs = legs.unhashed, zip(legs.terms, tensors)
        sizes = {leg: n for term, tensor in pairs for leg, n in zip(term.legs, tensor.shape)}
        self._describe(legs, sizes, modes)
        self._tensors = tuple(tensors)
        self.names = tuple(name_of(term) or "scalar" for term in legs.terms)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The slices, one for each term in the order of the line."""
        return self._tensors
