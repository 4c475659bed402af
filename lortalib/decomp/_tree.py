"""Finds the trees of bonds that can be cut, and moves factors along their edges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._bond_tree import Edge
from ._einsum import Names
from ._legs import Legs


def tree_edges(legs: Legs, modes: Sequence[str], root: int) -> tuple[Edge, ...]:
    """List the edges of a tree that algorithms can cut, children before their parents; see `Legs.tree`.

    A mode may stand on several parameters if these are connected: each of its positions then has a tree of
    its own, as each layer has in LoRA.

    Raises:
        ValueError: the bonds form no tree, or a mode stands on parameters that are not connected by others
            that carry it.
    """
    return _tree_edges(legs, tuple(modes), root)


@lru_cache(maxsize=1024)
def _tree_edges(legs: Legs, modes: Names, root: int) -> tuple[Edge, ...]:
    edges = legs.tree(modes, root)
    for mode in legs.open_legs(modes):
        carriers = legs.carriers[mode]
        if sum(e.child in carriers and e.parent in carriers for e in edges) < len(carriers) - 1:
            raise ValueError(
                f"the mode {mode!r} stands on parameters that are not neighbours, which closes a loop, in"
                f"\n    {legs}"
            )
    return edges


def is_tree(legs: Legs, modes: Sequence[str]) -> bool:
    """Return True if the bonds form a tree."""
    try:
        tree_edges(legs, modes, 0)
    except ValueError:
        return False
    return True


class Sides(NamedTuple):
    """A parameter as matrices: one for each position of the modes that it shares with a neighbour.

    Attributes:
        matrices: (*batch, rows, bond).
        shape: the sizes of the legs in the order of the matrices: shared modes, all other legs, the bond.
        back: the permutation from that order to the legs of the parameter.
    """

    matrices: Tensor
    shape: torch.Size
    back: tuple[int, ...]


@lru_cache(maxsize=4096)
def shared_modes(legs: Names, neighbour: Names, bond: str) -> Names:
    """List the modes that two neighbours in a tree share, in the order of the first."""
    return tuple(leg for leg in legs if leg in neighbour and leg != bond)


def unfold(tensor: Tensor, legs: Names, bond: str, batch: Names) -> Sides:
    """Unfold a parameter towards one of its bonds.

    Args:
        tensor: the parameter.
        legs: its legs.
        bond: the bond.
        batch: the modes that the parameter shares with its neighbour there.
    """
    order, back = _orders(legs, bond, batch)
    ordered = tensor.permute(order)
    shape = ordered.shape
    return Sides(ordered.reshape(*shape[: len(batch)], -1, shape[-1]), shape, back)


@lru_cache(maxsize=4096)
def _orders(legs: Names, bond: str, batch: Names) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the permutation of legs that `unfold` begins with, and the one that takes it back."""
    rows = (leg for leg in legs if leg not in batch and leg != bond)
    order = tuple(legs.index(leg) for leg in (*batch, *rows, bond))
    return order, tuple(sorted(range(len(order)), key=order.__getitem__))


def fold(sides: Sides, matrices: Tensor) -> Tensor:
    """Undo `unfold` for matrices whose number of columns may have changed."""
    return matrices.reshape(*sides.shape[:-1], matrices.shape[-1]).permute(sides.back)


def absorb(tensor: Tensor, legs: Names, bond: str, factor: Tensor, batch: Names) -> Tensor:
    """Multiply a parameter along a bond by matrices (*batch, new size, size)."""
    sides = unfold(tensor, legs, bond, batch)
    return fold(sides, sides.matrices @ factor.mT)


def positive_qr(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the QR decomposition whose R has no negative number on its diagonal.

    It is unique if the columns are independent.
    """
    q, r = torch.linalg.qr(matrices)
    sign = r.diagonal(dim1=-2, dim2=-1).sign()
    sign = torch.where(sign == 0, 1.0, sign)
    return q * sign.unsqueeze(-2), r * sign.unsqueeze(-1)


def orthonormalise(
    tensors: list[Tensor],
    terms: Sequence[Names],
    bond: str,
    giver: int,
    taker: int,
    qr: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.linalg.qr,
) -> None:
    """Make the columns of a parameter orthonormal towards a bond; the neighbour takes the other factor.

    Args:
        tensors: changed in place.
        terms: the legs of the tensors.
        bond: the bond.
        giver: the position of the parameter.
        taker: the position of its neighbour.
        qr: the QR decomposition.
    """
    batch = shared_modes(terms[giver], terms[taker], bond)
    sides = unfold(tensors[giver], terms[giver], bond, batch)
    q, r = qr(sides.matrices)
    tensors[giver] = fold(sides, q)
    tensors[taker] = absorb(tensors[taker], terms[taker], bond, r, batch)
