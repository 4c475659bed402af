"""Divides a network into the side of ``in`` and the other side, and contracts both to a low-rank pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._einsum import Names, Path, compile_constant, contract_along, contraction_path
from ._min_cut import SINK, SOURCE, exact_logarithms, source_side


class Partition(NamedTuple):
    """Two sides of a network and the bonds that cross between them."""

    in_side: tuple[int, ...]
    out_side: tuple[int, ...]
    bonds: Names


@compile_constant
def cheapest_cut(
    terms: tuple[Names, ...],
    sizes: tuple[tuple[str, int], ...],
    out_modes: Names,
    batch_modes: Names,
) -> Partition:
    """Split the parameters so that ``in`` lies on one side and ``out_modes`` on the other.

    The modes ``batch_modes`` are on both sides where both carry them: each of their values is cut alike.
    Of all such splits the one with the smallest product of crossing bonds; among equals the one with
    the fewest parameters beside ``in``, and then the one whose first parameters are there. It is found
    as a minimum cut, in time polynomial in the number of parameters.
    A parameter that carries ``in`` and a far mode cannot be split: then ``in_side`` is empty.
    """
    size = dict(sizes)
    nodes: list[int] = []  # for each parameter its node in the graph of the minimum cut
    free: list[int] = []
    for position, term in enumerate(terms):
        out_side = any(mode in term for mode in out_modes)
        if "in" in term and out_side:
            # No bond separates the two sides: everything is far, and `in` itself is what crosses.
            return Partition((), tuple(range(len(terms))), ("in",))
        if "in" in term or out_side:
            nodes.append(SOURCE if "in" in term else SINK)
        else:
            nodes.append(2 + position)
            free.append(2 + position)
    joined: dict[str, set[int]] = {}
    for node, term in zip(nodes, terms):
        for leg in term:
            if leg not in batch_modes:
                joined.setdefault(leg, set()).add(node)
    logarithm = exact_logarithms([size[leg] for leg in joined])
    # Counting and placing free parameters decides among equal products only: 2^n - 1 is the most that
    # placing can cost, n 2^n the most that counting can.
    one = 1 << len(free)
    edges = [
        (frozenset(ends), logarithm[size[leg]] * (len(free) + 1) * one)
        for leg, ends in joined.items()
        if size[leg] > 1 and not {SOURCE, SINK} <= ends
    ]
    near = source_side(edges, {node: one - (one >> k + 1) for k, node in enumerate(free)})
    in_side = tuple(k for k, node in enumerate(nodes) if node in near)
    rest = tuple(k for k, node in enumerate(nodes) if node not in near)
    beyond = {leg for k in rest for leg in terms[k]}
    crossing = (
        leg for k in in_side for leg in terms[k] if leg in beyond and leg not in batch_modes
    )
    return Partition(in_side, rest, tuple(dict.fromkeys(crossing)))


class Side(NamedTuple):
    """One side of a divided network, ready to be contracted.

    Attributes:
        parameters: positions of its parameters.
        path: their contraction.
        batch_modes: for each leading axis of the result whether a parameter carries it.
    """

    parameters: tuple[int, ...]
    path: Path
    batch_modes: tuple[bool, ...]

    def contract(self, tensors: Sequence[Tensor], tail: tuple[int, int]) -> Tensor:
        """Contract the side to (*batch_modes, *tail), with size 1 where nothing carries an axis."""
        found = contract_along(self.path, [tensors[k] for k in self.parameters])
        lead = iter(found.shape)
        return found.reshape(*(next(lead) if carried else 1 for carried in self.batch_modes), *tail)


class Cut(NamedTuple):
    """A low-rank pair: ``B @ A`` is a (head*out, in) slice of the tensor.

    Attributes:
        A: (p, in), with leading axes where several slices were cut at once.
        B: (head*out, p), likewise; row ``h*out + j`` is component j of head h.
    """

    A: Tensor
    B: Tensor


class CutPlan(NamedTuple):
    """A network divided at its cheapest cut.

    Attributes:
        partition: which parameters are on which side.
        rank: product of the sizes of the bonds that cross.
        in_side: the side of ``in``; nothing if ``in`` itself crosses.
        out_side: the other side.
    """

    partition: Partition
    rank: int
    in_side: Side | None
    out_side: Side

    def cut(self, tensors: Sequence[Tensor]) -> Cut:
        """Contract the low-rank pair of a network with these tensors as parameters.

        Args:
            tensors: in the order of the line, of the sizes that were planned for.
        """
        leading = len(self.out_side.batch_modes)
        if self.in_side is None:
            a = torch.eye(self.rank, dtype=tensors[0].dtype, device=tensors[0].device)
            a = a.reshape(*[1] * leading, self.rank, self.rank)
        else:
            a = self.in_side.contract(tensors, (self.rank, -1))
        return Cut(a, self.out_side.contract(tensors, (self.rank, -1)).mT)


@compile_constant
def make_cut_plan(
    terms: tuple[Names, ...],
    sizes: tuple[tuple[str, int], ...],
    out_modes: Names,
    batch_modes: Names,
) -> CutPlan:
    """Divide a network by `cheapest_cut`, and order the contractions of either side."""
    partition = cheapest_cut(terms, sizes, out_modes, batch_modes)
    size = dict(sizes)

    def side(positions: tuple[int, ...], rows: Names) -> Side:
        own = tuple(terms[k] for k in positions)
        carried = {leg for term in own for leg in term}
        lead = tuple(mode for mode in batch_modes if mode in carried)
        path = contraction_path(own, (*lead, *rows), sizes)
        return Side(positions, path, tuple(mode in carried for mode in batch_modes))

    in_side = side(partition.in_side, (*partition.bonds, "in")) if partition.in_side else None
    # The bonds lead in memory: products with B then run along rows of head*out.
    out_side = side(partition.out_side, (*partition.bonds, *out_modes))
    return CutPlan(partition, math.prod(size[bond] for bond in partition.bonds), in_side, out_side)
