"""States what a fit minimises: the squared distance to a target, dense or a sum of networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from ._einsum import Names
from ._kept_product import KeptProduct
from ._pieces import Pieces, joined


class Objective:
    """The squared distance between a target and a network, each entry with a weight.

    The target is a list of summands; a dense tensor is a summand of one piece. Everything is a
    contraction of pieces, so a target that is a network is never formed.

    Args:
        summands: the pieces of every summand; their other legs are the modes.
        modes: the modes.
        weight: the pieces of the weights of the entries, without other legs than modes; None for ones.
        squared_norm: the squared norm of the target; None if it is not known.
    """

    def __init__(
        self,
        summands: Sequence[Pieces],
        modes: Names,
        weight: Pieces | None = None,
        squared_norm: float | None = None,
    ) -> None:
        self.summands, self.modes, self.weight = list(summands), modes, weight
        self._weight = weight or Pieces((), ())
        self.is_dense = len(self.summands) == 1 and self.summands[0].terms == (modes,)
        if squared_norm is None:
            pairs = product(self.summands, repeat=2)
            squared_norm = sum(self._pair(one, other).item() for one, other in pairs)
        self.squared_norm = squared_norm
        self._kept: KeptProduct | None = None

    def scaled(self, factor: float) -> Objective:
        """Multiply the target by a number."""
        summands = [
            Pieces(pieces.terms, (pieces.tensors[0] * factor, *pieces.tensors[1:]))
            for pieces in self.summands
        ]
        return Objective(summands, self.modes, self.weight, factor**2 * self.squared_norm)

    def target_side(self, net: Pieces, position: int) -> Tensor:
        """Contract the target, the weights and all tensors but one to the legs of that one.

        It is the right-hand side of the normal equations of the parameter.
        """
        rest, legs = net.without(position), net.terms[position]
        if self.is_dense:
            rest = rest if self._is_whole else joined(self._weight, rest)
            return self._target().contract(rest, legs)
        parts = [
            joined(summand.renamed("*", self.modes), self._weight, rest).contract(legs)
            for summand in self.summands
        ]
        return torch.stack(parts).sum(0)

    def residual_side(self, net: Pieces, position: int) -> Tensor:
        """Contract a dense residual, the weights and all tensors but one to the legs of that one.

        It is half the negative gradient of the squared distance. The residual is subtracted entry by entry,
        which keeps its relative precision.
        """
        gap = Pieces((self.modes,), (self._gap(net),))
        return joined(gap, self._weight, net.without(position)).contract(net.terms[position])

    def _gap(self, net: Pieces) -> Tensor:
        return self.summands[0].tensors[0] - net.contract(self.modes)

    @property
    def _is_whole(self) -> bool:
        """Whether the weights are one tensor over all modes, as those of a mask are."""
        return self._weight.terms == (self.modes,)

    def _target(self) -> KeptProduct:
        """Return the dense target, multiplied by weights that are one tensor."""
        if self._kept is None:
            dense = self.summands[0].tensors[0]
            dense = dense * self._weight.tensors[0] if self._is_whole else dense
            self._kept = KeptProduct(dense, self.modes)
        return self._kept

    @property
    def precision(self) -> float:
        """The relative error below which there are only rounding errors."""
        return 1e-14 if self.is_dense else 2e-8

    def loss(self, net: Pieces) -> Tensor:
        """Compute the squared distance; differentiable.

        For a dense target it is summed entry by entry. For networks it is ``|T|^2 - 2 <T, N> + |N|^2``, in
        which numbers below the machine precision times ``|T|^2`` are lost.
        """
        if self.is_dense:
            gap = self._gap(net)
            if self.weight is None:
                norm: Tensor = torch.linalg.vector_norm(gap)
                return norm.square()
            return joined(Pieces((self.modes,), (gap.square(),)), self.weight).contract(())
        cross = torch.stack([self._pair(summand, net) for summand in self.summands]).sum()
        return (self.squared_norm + self._pair(net, net) - 2 * cross).clamp(min=0)

    def relative_error(self, net: Pieces) -> float:
        """Compute the distance divided by the norm of the target; zero for a zero target met exactly."""
        return self.relative(self.loss(net).item())

    def relative(self, squared: float) -> float:
        """Compute the distance divided by the norm of the target from the squared distance."""
        return math.sqrt(max(0.0, squared) / (self.squared_norm or 1.0))

    def _pair(self, one: Pieces, other: Pieces) -> Tensor:
        """Compute the weighted inner product of two collections of pieces."""
        return joined(
            one.renamed("*", self.modes), self._weight, other.renamed("'", self.modes)
        ).contract(())
