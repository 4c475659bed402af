"""Divides a network into the side of ``in`` and the side of ``out``, and contracts each to a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._einsum import Names, Path, compile_constant, contract_along, contraction_path
from ._factors import product
from ._min_cut import SINK, SOURCE, exact_logarithms, source_side
from ._notation import LegsError

#: The modes of the side of ``out``.
OUT_MODES = ("head", "out")


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
    in_modes: Names = ("in",),
) -> Partition:
    """Split the parameters so that ``in_modes`` lie on one side and ``out_modes`` on the other.

    Of all such splits this returns the one with the smallest product of crossing bonds. Among equal
    ones it prefers fewer parameters on the side of ``in_modes``, then the parameters that come first in the
    line. A minimum cut finds it, in time polynomial in the number of parameters.

    The modes ``batch_modes`` may stand on both sides: all their slices are cut at the same place. A
    parameter that carries one of ``in_modes`` and one of ``out_modes`` cannot be split: it is on the side of
    ``out``, and its legs of ``in`` cross. If no other parameter carries such a leg, or nothing is gained by
    a side of ``in``, all of ``in`` crosses and ``in_side`` is empty.
    """
    size = dict(sizes)
    nodes: list[int] = []  # the node of each parameter in the graph of the minimum cut
    free: list[int] = []
    for position, term in enumerate(terms):
        out_side = any(mode in term for mode in out_modes)
        in_side = any(mode in term for mode in in_modes)
        if in_side or out_side:
            nodes.append(SINK if out_side else SOURCE)
        else:
            nodes.append(2 + position)
            free.append(2 + position)
    if SOURCE not in nodes:
        # No bond separates the sides: all parameters are on that of `out`, and `in` itself crosses.
        return Partition((), tuple(range(len(terms))), in_modes)
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
    near_terms = tuple(k for k, node in enumerate(nodes) if node in near)
    rest = tuple(k for k, node in enumerate(nodes) if node not in near)
    beyond = {leg for k in rest for leg in terms[k]}
    near_legs = [leg for k in near_terms for leg in terms[k] if leg not in batch_modes]
    crossing = [leg for leg in near_legs if leg in beyond]
    inputs = [leg for leg in in_modes if leg in beyond]
    crossing += inputs
    rank = math.prod(size[leg] for leg in {*crossing})
    if inputs and rank >= math.prod(size[leg] for leg in in_modes):
        return Partition((), tuple(range(len(terms))), in_modes)
    return Partition(near_terms, rest, tuple(dict.fromkeys(crossing)))


class Side(NamedTuple):
    """One side of a divided network, with the order of its contraction.

    Attributes:
        parameters: positions of its parameters.
        path: the steps of their contraction.
        batch_modes: for each leading axis of the result, whether a parameter of this side carries it.
        absent: for each leading axis, the sizes of its factors (one, if the mode is whole) that no parameter
            of this side carries; 0 for those that one does.
        identities: sizes of the legs of ``in`` that cross; its side has an identity matrix for each.
    """

    parameters: tuple[int, ...]
    path: Path
    batch_modes: tuple[bool, ...]
    absent: tuple[tuple[int, ...], ...]
    identities: tuple[int, ...] = ()

    def contract(self, tensors: Sequence[Tensor], tail: Sequence[int]) -> Tensor:
        """Contract this side to the shape (*batch_modes, *tail); an axis that it lacks has size 1."""
        like = tensors[0]
        eyes = [torch.eye(n, dtype=like.dtype, device=like.device) for n in self.identities]
        found = contract_along(self.path, [*(tensors[k] for k in self.parameters), *eyes])
        lead = iter(found.shape)
        ones: list[int] = []
        full: list[int] = []
        axes: list[int] = []
        for factors in self.absent:
            missing = all(factors)
            own = [1 if missing else size or next(lead) for size in factors]
            ones += [1 if size else n for size, n in zip(factors, own)]
            full += own
            axes.append(product(own))
        if ones != full:  # a split mode of which this side carries some factors only
            found = found.reshape(*ones, *tail).expand(*full, *tail)
        return found.reshape(*axes, *tail)


def make_side(
    terms: tuple[Names, ...],
    sizes: tuple[tuple[str, int], ...],
    parameters: tuple[int, ...],
    batch_modes: tuple[Names, ...],
    legs: Names,
    crossing: Names = (),
) -> Side:
    """Plan the contraction of some parameters to the axes ``legs``, behind those of ``batch_modes``.

    Args:
        terms: the legs of each parameter.
        sizes: the size of every leg.
        parameters: positions of the parameters.
        batch_modes: for each mode that becomes a leading axis its legs.
        legs: the axes that follow.
        crossing: legs of ``in`` that cross, each of which gets an identity matrix.
    """
    size = dict(sizes)
    batch_legs = tuple(leg for own in batch_modes for leg in own)
    eyes = tuple((leg, _far_end(leg)) for leg in crossing)
    own = (*(terms[k] for k in parameters), *eyes)
    carried = {leg for term in own for leg in term}
    lead = tuple(leg for leg in batch_legs if leg in carried)
    ends = tuple((_far_end(leg), size[leg]) for leg in crossing)
    path = contraction_path(own, (*lead, *legs), (*sizes, *ends))
    absent = tuple(
        tuple(0 if leg in carried else size[leg] for leg in factors) for factors in batch_modes
    )
    shown = tuple(not all(factors) for factors in absent)
    return Side(parameters, path, shown, absent, tuple(size[leg] for leg in crossing))


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


def check_cut(modes: Sequence[str], batch_modes: Sequence[str]) -> None:
    """Check that a network over these modes can be cut over ``batch_modes``; see `TensorNetwork.cut`."""
    absent = [mode for mode in batch_modes if mode not in modes or mode in ("in", *OUT_MODES)]
    if absent or len(set(batch_modes)) < len(batch_modes):
        raise LegsError(
            f"cannot cut over {', '.join(map(repr, batch_modes))}: these are to be different modes of "
            f"the network, which has {', '.join(modes)}, other than in, head and out"
        )
    others = [mode for mode in modes if mode not in ("in", *OUT_MODES, *batch_modes)]
    if others or "in" not in modes or "out" not in modes:
        names = ", ".join(f"{mode}=0" for mode in others)
        every = ", ".join(repr(mode) for mode in (*batch_modes, *others))
        raise LegsError(
            "a cut needs the modes in, out and optionally head, and no others; "
            f"this network has {', '.join(modes)}."
            + f" Select first: net.select({names}).cut(), or cut them all: net.cut({every})"
            * bool(others)
        )


@compile_constant
def make_cut_plan(
    terms: tuple[Names, ...],
    sizes: tuple[tuple[str, int], ...],
    in_modes: Names,
    out_modes: Names,
    batch_modes: tuple[Names, ...],
) -> CutPlan:
    """Plan a cut: divide the network by `cheapest_cut` and order the contraction of each side.

    Args:
        terms: the legs of each parameter.
        sizes: the size of every leg.
        in_modes: the legs of ``in``: itself, or its factors.
        out_modes: the legs of the other side.
        batch_modes: for each mode that becomes a leading axis its legs.
    """
    batch_legs = tuple(leg for legs in batch_modes for leg in legs)
    partition = cheapest_cut(terms, sizes, out_modes, batch_legs, in_modes)
    size = dict(sizes)
    in_side = None
    if partition.in_side:
        crossing = tuple(leg for leg in in_modes if leg in partition.bonds)
        rows = (_far_end(leg) if leg in crossing else leg for leg in in_modes)
        in_legs = (*partition.bonds, *rows)
        in_side = make_side(terms, sizes, partition.in_side, batch_modes, in_legs, crossing)
    # The bonds come first, so that the product with B reads memory in order.
    out_legs = (*partition.bonds, *out_modes)
    out_side = make_side(terms, sizes, partition.out_side, batch_modes, out_legs)
    return CutPlan(partition, math.prod(size[bond] for bond in partition.bonds), in_side, out_side)


def _far_end(leg: str) -> str:
    """Name the axis of ``in`` of the identity matrix for a leg that crosses."""
    return leg + "'"
