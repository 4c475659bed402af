"""Holds a network whose ranks were changed, and the maps that carry the state of an optimiser over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._einsum import Names
from ._network import Network
from ._tensor_network import TensorNetwork
from ._tree import absorb


@dataclass(frozen=True)
class BondMap:
    """The change of one parameter's coordinates along one bond.

    Attributes:
        values: ``(*batch, new rank, old rank)``, what the parameter is multiplied by.
        gradients: ``(*batch, new rank, old rank)``, what its gradients are multiplied by. The transpose
            writes the new parameter in the old coordinates, and ``gradients @ values^T`` is the identity.
        batch: the modes of the leading axes; each of their positions has coordinates of its own.

    Example:
        >>> from lortalib.decomp import grow, lotr
        >>> change = grow(lotr((2, 2, 2, 8, 4), rank=2), {"p": 3})
        >>> change.maps[0]["p"].values.shape  # of the parameter "in p"
        torch.Size([3, 2])
    """

    values: Tensor
    gradients: Tensor
    batch: Names = ()

    @property
    def squares(self) -> Tensor:
        """What squares of gradients are multiplied by: the squares of the entries of ``gradients``; a new
        coordinate takes the mean of the old ones."""
        squares = self.gradients.square()
        is_new = squares.sum(-1, keepdim=True) == 0
        return torch.where(is_new, 1 / squares.shape[-1], squares)


@dataclass(frozen=True)
class RankChange:
    """A network whose ranks were changed, and how the state of an optimiser follows.

    Write the new parameters in the old coordinates: that is a linear map E, from the new parameters to old
    ones that give the same tensor. The gradient at the new parameters is then the transpose of E times the
    gradient at the old ones. So a momentum, which is an average of gradients, is multiplied by the transpose
    of E too (`gradient`), and not by the map of the parameters (`value`). Where E has orthonormal columns the
    two are the same, and a step of SGD with momentum is the same step in both coordinates.

    Adam's average of squared gradients is the diagonal of an uncentred covariance. The transpose of E maps
    that matrix exactly, but the diagonal alone only if the entries off the diagonal vanish: `square` assumes
    this, as Adam does, and multiplies by the squared entries. LDAdam (Robert et al. 2025, arXiv 2410.16103)
    makes the same assumption about the covariance around the mean.

    Attributes:
        network: the network with the new ranks; it has parameters of its own.
        error: ``|net - network| / |net|``, 0 for a zero tensor.
        maps: for each term of the line, the change along each of its bonds whose rank changed.

    Example:
        >>> from lortalib.decomp import lotr, prune
        >>> change = prune(lotr((2, 2, 2, 8, 4), rank=3, init="normal"), 2)
        >>> change.network.ranks, 0 < change.error < 1
        ({'p': 2, 'q': 2}, True)
    """

    network: Network
    error: float
    maps: tuple[Mapping[str, BondMap], ...]

    def value(self, position: int, tensor: Tensor) -> Tensor:
        """Map a tensor as the parameter itself is mapped; new coordinates are zero.

        Args:
            position: the position of the parameter in the line.
            tensor: a tensor of the shape of the old parameter.

        Returns:
            A tensor of the shape of the new parameter.
        """
        return self._mapped(position, tensor, "values")

    def gradient(self, position: int, tensor: Tensor) -> Tensor:
        """Map a gradient or an average of gradients; new coordinates are zero. See `value`.

        Args:
            position: the position of the parameter in the line.
            tensor: a tensor of the shape of the old parameter.
        """
        return self._mapped(position, tensor, "gradients")

    def square(self, position: int, tensor: Tensor) -> Tensor:
        """Map an average of squared gradients; a new coordinate takes the mean of the old ones. See `value`.

        With zeros there, Adam's first step along a new coordinate would be longer than all others: its count
        of steps no longer corrects for averages that begin at zero.

        Args:
            position: the position of the parameter in the line.
            tensor: a tensor of the shape of the old parameter.
        """
        return self._mapped(position, tensor, "squares")

    def _mapped(self, position: int, tensor: Tensor, kind: str) -> Tensor:
        found = tensor.detach().double()
        for bond, each in self.maps[position].items():
            legs = self.network.legs.terms[position].legs
            found = absorb(found, legs, bond, getattr(each, kind), each.batch)
        return found.to(tensor.dtype, copy=True).contiguous()


def refuse_fixed(net: TensorNetwork, what: str) -> None:
    """Refuse a network with parameters whose numbers are not free: frozen, or hashed from a vector.

    Raises:
        ValueError: there is one.
    """
    fixed = [term for term in net.legs.terms if (term.frozen or term.of) and not term.tied]
    if fixed:
        why = (
            f"its entries are numbers of the vector {fixed[0].of!r}, which another rank would draw anew"
            if fixed[0].of
            else "a frozen parameter keeps its numbers"
        )
        raise ValueError(f"cannot {what} the ranks of ({fixed[0]}): {why}, in\n    {net.legs}")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in net.tensors):
        raise ValueError(f"cannot {what} the ranks of a network with NaN or infinity")


def changed(net: Network, tensors: Sequence[Tensor]) -> Network:
    """Make a network of the same line from tensors of other ranks, in the dtype of the old parameters."""
    own = [new.to(old.dtype, copy=True).contiguous() for new, old in zip(tensors, net.tensors)]
    return Network(net.legs, [own[owner] for owner in net.legs.owners], net.modes)
