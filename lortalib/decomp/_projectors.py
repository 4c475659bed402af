"""Finds, for the bonds of a tree, the projectors that leave out as little of the tensor as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._bond_tree import Edge
from ._canonical import wide_copies
from ._einsum import Names
from ._tensor_network import TensorNetwork
from ._tree import absorb, shared_modes, tree_edges, unfold

#: Directions of a bond that one side does not have count as this part of that side: enough to choose
#: between them, and its square is below the precision of float64.
_FLOOR = 1e-8


class Projector(NamedTuple):
    """A projector ``columns @ rows`` along the bond of an edge; ``rows @ columns`` is the identity.

    Attributes:
        edge: the bond, with its child and its parent.
        columns: (*batch, old rank, new rank), for the child: each of its rows is multiplied by them.
        rows: (*batch, new rank, old rank), for the parent.
        batch: the modes of the leading axes.
    """

    edge: Edge
    columns: Tensor
    rows: Tensor
    batch: Names


class _Side(NamedTuple):
    """A triangular factor of all that is on one side of a bond: (*batch, rows, bond)."""

    factor: Tensor
    batch: Names


def projectors(net: TensorNetwork, ranks: Mapping[str, int]) -> list[Projector]:
    """Find the projectors of the bonds of a tree that get a smaller rank.

    Cut at a bond, the tensor is ``L R^T``. With the singular values of the triangular factors of L and R,
    ``P = R^T V S^-1 U^T L`` makes ``L P R^T`` the best approximation of that rank: this is balanced
    truncation by square roots (Tombs and Postlethwaite 1987), which needs no squares of L and R. All bonds
    have their projectors from the whole tensor; along a tree they then act as orthogonal projections, root
    first, so the squared error is at most the sum of those of the bonds alone (Grasedyck 2010).

    P is divided into two factors of equal singular values. These are at least 1, and all are 1 where P is
    orthogonal: then the new coordinates are an orthonormal part of the old ones.
    """
    terms = [term.legs for term in net.legs.terms]
    edges = tree_edges(net.legs, net.modes, net.legs.zero)
    below, above = _triangular_factors(wide_copies(net), terms, edges)
    found = []
    for edge in edges:
        size = ranks[edge.bond]
        if size == net.sizes[edge.bond]:
            continue
        low, high = below[edge.bond], above[edge.bond]
        order = [high.batch.index(mode) for mode in low.batch]
        factor = high.factor.permute(*order, -2, -1)
        columns, rows = _best(_with_floor(low.factor), _with_floor(factor), size)
        found.append(Projector(edge, columns, rows, low.batch))
    return found


def _triangular_factors(
    tensors: Sequence[Tensor], terms: Sequence[Names], edges: Sequence[Edge]
) -> tuple[dict[str, _Side], dict[str, _Side]]:
    """Compute the triangular factors below and above every bond of a tree."""
    below: dict[str, _Side] = {}
    above: dict[str, _Side] = {}

    def gathered(node: int, towards: Edge) -> _Side:
        tensor = tensors[node]
        for edge in edges:
            if edge is not towards and node in (edge.child, edge.parent):
                side = below[edge.bond] if edge.parent == node else above[edge.bond]
                tensor = absorb(tensor, terms[node], edge.bond, side.factor, side.batch)
        neighbour = towards.parent if node == towards.child else towards.child
        batch = shared_modes(terms[node], terms[neighbour], towards.bond)
        sides = unfold(tensor, terms[node], towards.bond, batch)
        return _Side(torch.linalg.qr(sides.matrices, mode="r").R, batch)

    for edge in edges:
        below[edge.bond] = gathered(edge.child, edge)
    for edge in reversed(edges):
        above[edge.bond] = gathered(edge.parent, edge)
    return below, above


def _with_floor(factor: Tensor) -> Tensor:
    """Scale a triangular factor, and give it a small part in every direction of the bond."""
    norm = torch.linalg.matrix_norm(factor, keepdim=True)
    scaled = factor / torch.where(norm > 0, norm, 1.0)
    floor = _FLOOR * torch.eye(factor.shape[-1]).to(factor)
    return torch.cat([scaled, floor.expand(*factor.shape[:-2], -1, -1)], -2)


def _best(low: Tensor, high: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Compute the two factors of the best projector of a rank, with equal singular values."""
    u, values, vh = torch.linalg.svd(low @ high.mT, full_matrices=False)
    inverse_root = values[..., :size].rsqrt()
    columns = high.mT @ vh[..., :size, :].mT * inverse_root.unsqueeze(-2)
    rows = inverse_root.unsqueeze(-1) * (u[..., :size].mT @ low)
    left, stretch, right = torch.linalg.svd(columns @ rows, full_matrices=False)
    root = stretch[..., :size].sqrt()
    return left[..., :size] * root.unsqueeze(-2), root.unsqueeze(-1) * right[..., :size, :]
