"""Divides a network into the side of ``in`` and the side of ``out``, and contracts each to a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._einsum import Names, Path, compile_constant, contract_along, contraction_path
from ._min_cut import SINK, SOURCE, exact_logarithms, source_side
from ._notation import LegsError

#: The modes on the other side of a cut than ``in``.
FAR = ("head", "out")


class Partition(NamedTuple):
    """The parameters of a network in two groups, and the bonds between the groups.

    Attributes:
        in_side: positions of the parameters on the side of ``in``.
        out_side: positions of all others.
        bonds: the bonds that join the two sides.
    """

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

    Of all such splits this returns the one with the smallest product of crossing bonds. Among equal
    ones it prefers fewer parameters on the side of ``in``, then the parameters that come first in the
    line. A minimum cut finds it, in time polynomial in the number of parameters.

    The modes ``batch_modes`` may stand on both sides: all their slices are cut at the same place. A
    parameter that carries both ``in`` and one of ``out_modes`` cannot be split; then ``in_side`` is empty.
    """
    size = dict(sizes)
    nodes: list[int] = []  # the node of each parameter in the graph of the minimum cut
    free: list[int] = []
    for position, term in enumerate(terms):
        out_side = any(mode in term for mode in out_modes)
        if "in" in term and out_side:
            # No bond separates the sides: all parameters are on that of `out`, and `in` itself crosses.
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
    # The number and the places of free parameters must decide only among equal products. Places cost at
    # most 2^n - 1 and the number costs at most n 2^n, so bonds are weighted by (n + 1) 2^n.
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
    """One side of a divided network, with the order of its contraction.

    Attributes:
        parameters: positions of its parameters.
        path: the steps of their contraction.
        batch_modes: for each leading axis of the result, whether a parameter of this side carries it.
    """

    parameters: tuple[int, ...]
    path: Path
    batch_modes: tuple[bool, ...]

    def contract(self, tensors: Sequence[Tensor], tail: tuple[int, int]) -> Tensor:
        """Contract this side to the shape (*batch_modes, *tail); an axis that it lacks has size 1."""
        found = contract_along(self.path, [tensors[k] for k in self.parameters])
        lead = iter(found.shape)
        return found.reshape(*(next(lead) if carried else 1 for carried in self.batch_modes), *tail)


class Cut(NamedTuple):
    """A low-rank pair (A, B): ``B @ A`` is a slice of the tensor as a (head*out, in) matrix.

    Attributes:
        A: (p, in), with leading axes if several slices were cut at once.
        B: (head*out, p), with the same leading axes; row ``h*out + j`` is component j of head h.
    """

    A: Tensor
    B: Tensor


class CutPlan(NamedTuple):
    """A plan that says where a network is divided and how each side is contracted.

    Attributes:
        partition: which parameters are on which side.
        rank: product of the sizes of the bonds that cross; the p of the low-rank pair.
        in_side: the side of ``in``; None if ``in`` itself crosses.
        out_side: the side of ``out``.
    """

    partition: Partition
    rank: int
    in_side: Side | None
    out_side: Side

    def cut(self, tensors: Sequence[Tensor]) -> Cut:
        """Contract the tensors of a network to its low-rank pair.

        Args:
            tensors: the parameters in the order of the line, with the sizes that the plan was made for.
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
    """Plan a cut: divide the network by `cheapest_cut` and order the contraction of each side."""
    partition = cheapest_cut(terms, sizes, out_modes, batch_modes)
    size = dict(sizes)

    def side(positions: tuple[int, ...], rows: Names) -> Side:
        own = tuple(terms[k] for k in positions)
        carried = {leg for term in own for leg in term}
        lead = tuple(mode for mode in batch_modes if mode in carried)
        path = contraction_path(own, (*lead, *rows), sizes)
        return Side(positions, path, tuple(mode in carried for mode in batch_modes))

    in_side = side(partition.in_side, (*partition.bonds, "in")) if partition.in_side else None
    # The bonds come first, so that the product with B reads memory in order.
    out_side = side(partition.out_side, (*partition.bonds, *out_modes))
    return CutPlan(partition, math.prod(size[bond] for bond in partition.bonds), in_side, out_side)


def check_cut(modes: Sequence[str], batch_modes: Sequence[str]) -> None:
    """Refuse a cut of a network with other modes than those that a pair has.

    Args:
        modes: the modes of the network.
        batch_modes: the modes that become leading axes of the pair.

    Raises:
        LegsError: as `TensorNetwork.cut`.
    """
    absent = [mode for mode in batch_modes if mode not in modes or mode in ("in", *FAR)]
    if absent or len(set(batch_modes)) < len(batch_modes):
        raise LegsError(
            f"cannot cut over {', '.join(map(repr, batch_modes))}: these are to be different modes of "
            f"the network, which has {', '.join(modes)}, other than in, head and out"
        )
    others = [mode for mode in modes if mode not in ("in", *FAR, *batch_modes)]
    if others or "in" not in modes or "out" not in modes:
        names = ", ".join(f"{mode}=0" for mode in others)
        every = ", ".join(repr(mode) for mode in (*batch_modes, *others))
        raise LegsError(
            "a cut needs the modes in, out and optionally head, and no others; "
            f"this network has {', '.join(modes)}."
            + f" Select first: net.select({names}).cut(), or cut them all: net.cut({every})"
            * bool(others)
        )
