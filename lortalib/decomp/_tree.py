"""Finds the trees of bonds that can be cut, and moves factors along their edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._bond_tree import Edge
from ._einsum import Names, contract
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
    """A parameter as matrices: one for each position of the modes that it shares with its neighbour.

    Attributes:
        matrices: (*batch, rows, bond).
        batch: the shared modes.
        rows: all other legs but the bond.
        shape: the sizes of the rows.
    """

    matrices: Tensor
    batch: Names
    rows: Names
    shape: tuple[int, ...]


def unfold(tensor: Tensor, legs: Names, bond: str, neighbour: Names) -> Sides:
    """Unfold a parameter towards one of its bonds."""
    batch = tuple(leg for leg in legs if leg in neighbour and leg != bond)
    rows = tuple(leg for leg in legs if leg not in batch and leg != bond)
    ordered = tensor.permute([legs.index(leg) for leg in (*batch, *rows, bond)])
    shape = tuple(ordered.shape[len(batch) : -1])
    lead = ordered.shape[: len(batch)]
    matrices = ordered.reshape(*lead, math.prod(shape), ordered.shape[-1])
    return Sides(matrices, batch, rows, shape)


def fold(sides: Sides, matrices: Tensor, legs: Names, bond: str) -> Tensor:
    """Undo `unfold` for matrices whose number of columns may have changed."""
    lead = matrices.shape[: len(sides.batch)]
    order = (*sides.batch, *sides.rows, bond)
    tensor = matrices.reshape(*lead, *sides.shape, matrices.shape[-1])
    return tensor.permute([order.index(leg) for leg in legs])


def absorb(tensor: Tensor, legs: Names, bond: str, factor: Tensor, batch: Names) -> Tensor:
    """Multiply a parameter along a bond by matrices (*batch, new size, size)."""
    fresh = bond + "'"
    output = tuple(fresh if leg == bond else leg for leg in legs)
    term = (*batch, fresh, bond)
    sizes = dict(zip(legs, tensor.shape)) | dict(zip(term, factor.shape))
    return contract((legs, term), (tensor, factor), output, sizes)


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
    sides = unfold(tensors[giver], terms[giver], bond, terms[taker])
    q, r = qr(sides.matrices)
    tensors[giver] = fold(sides, q, terms[giver], bond)
    tensors[taker] = absorb(tensors[taker], terms[taker], bond, r, sides.batch)
