"""Rounds a network to smaller ranks: by truncated singular values on trees, by a fit elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Real

import torch
from torch import Tensor

from ._arguments import check_finite, check_values, takes_network
from ._canonical import rebuilt, refuse_frozen, wide_copies
from ._fit import fit
from ._network import Network
from ._ranks import Rank, read_ranks
from ._tensor_network import TensorNetwork
from ._tree import absorb, fold, is_tree, orthonormalise, shared_modes, tree_edges, unfold


@dataclass(frozen=True)
class Rounding:
    """A network of smaller ranks, and how near it is.

    Attributes:
        network: the network.
        error: ``|net - network| / |net|``. On trees it is computed from the singular values that were left
            out, so it is exact, also far below 1e-8.
        least: a relative error below which no network of the line has these ranks; None after a fit. The
            error is at most this number times the root of the number of bonds.
        how: the name of the algorithm.

    Example:
        >>> from lortalib.decomp import direct_sum, round, tt
        >>> net = tt({"layer": 6, "in": 64, "out": 16}, rank=2, init="normal")
        >>> found = round(direct_sum([net, net], [1, 1]), error=1e-5)
        >>> found.network.ranks, found.error < 1e-5
        ({'a': 2, 'b': 2}, True)
    """

    network: Network
    error: float
    least: float | None
    how: str


@takes_network
def round(net: TensorNetwork, *, rank: Rank | None = None, error: float | None = None) -> Rounding:
    """Give a network smaller ranks, either given ones or the smallest ones within an error.

    If the bonds form a tree, each bond is truncated once, by the singular values of the tensor there
    (Oseledets 2011 for trains, Grasedyck 2010 for other trees). The error is at most the root of the
    number of bonds times the best possible one. Modes that a bond's two parameters share are kept
    apart: each slice has singular values of its own. Other lines are fitted to the network by `fit`; there
    an error is reached with the smallest equal share of all ranks, at the latest with all of them.

    Args:
        net: the network. The whole tensor is not formed.
        rank: ranks as for `network`, or a mapping with some bonds. Larger ones than those of the network stay
            as they are.
        error: the largest relative error in the Frobenius norm, 0 or more and below 1.

    Returns:
        `Rounding`, with the error that was made.

    Raises:
        ValueError: neither or both of rank and error; an error outside its range; ranks below 1 or of other
            bonds; frozen parameters, whose sizes are fixed.

    Example:
        >>> from lortalib.decomp import direct_sum, tt
        >>> net = tt({"layer": 3, "in": 8, "out": 4}, 2, init="normal", dtype=torch.float64)
        >>> twice = direct_sum([net, net])
        >>> twice.ranks, round(twice, error=1e-10).network.ranks
        ({'a': 4, 'b': 4}, {'a': 2, 'b': 2})
    """
    if (rank is None) == (error is None):
        raise ValueError("give either rank= or error=, what is to be reached")
    if error is not None and not (isinstance(error, Real) and 0 <= error < 1):
        raise ValueError(f"error is relative, from 0 up to below 1; found {error!r}")
    check_values(net.stored, "rounding")
    refuse_frozen(net.legs, "rounding")
    wanted = None
    if rank is not None:
        asked = read_ranks(net.legs.unhashed, net.modes, rank, net.ranks)
        wanted = {bond: min(asked[bond], size) for bond, size in net.ranks.items()}
    if is_tree(net.legs, net.modes) and not any(term.tied for term in net.legs.terms):
        return _truncated(net, wanted, error)
    check_finite(net, "rounding")
    if wanted is not None:
        return _fitted(net, wanted)
    assert error is not None
    return _fitted_within(net, error)


def _truncated(
    net: TensorNetwork, wanted: Mapping[str, int] | None, error: float | None
) -> Rounding:
    """Truncate each bond of a tree once, when the centre leaves one of its sides for good.

    A parameter at an end of the tree becomes the centre; all others are orthonormal towards it. The centre
    then visits every parameter. Seen from a truncated bond, all later ones lie on one side, so it is a
    projection of the modes of the other side, which later ones leave as they are. The squares of
    what is left out therefore add up to the squared error (Vannieuwenhoven et al. 2012).
    """
    # No copies: every tensor that an edge reaches is replaced.
    tensors = [tensor.detach().double() for tensor in net.tensors]
    terms = [term.legs for term in net.legs.terms]
    # From an end, the centre of a train need not come back.
    start = next((edge.child for edge in tree_edges(net.legs, net.modes, net.legs.zero)), 0)
    edges = tree_edges(net.legs, net.modes, start)
    for edge in edges:
        orthonormalise(tensors, terms, edge.bond, edge.child, edge.parent)
    peak = torch.linalg.vector_norm(tensors[start], math.inf).item()
    if not math.isfinite(peak):
        check_finite(net, "rounding")
    # Squares of huge or tiny entries are no numbers; a power of two scales without rounding.
    unit = math.ldexp(1.0, math.frexp(peak)[1] - 1)
    tensors[start] = tensors[start] / unit
    total = tensors[start].square().sum().item()
    room = (error or 0.0) ** 2 * total
    left = [0.0]

    def cut(bond: str, giver: int, taker: int) -> None:
        share = (room - sum(left)) / (len(edges) + 1 - len(left))
        keep = None if wanted is None else wanted[bond]
        left.append(_truncate(tensors, terms, bond, giver, taker, keep, share))

    def visit(node: int, returns: bool) -> None:
        below = [edge for edge in edges if edge.parent == node]
        for child, _, bond in below:
            if returns or child != below[-1].child:
                orthonormalise(tensors, terms, bond, node, child)
                visit(child, True)
                cut(bond, child, node)
            else:
                cut(bond, node, child)
                visit(child, False)

    visit(start, False)
    tensors[start] = tensors[start] * unit
    network = rebuilt(net, tensors)
    scale = total or 1.0
    made, least = math.sqrt(sum(left) / scale), math.sqrt(max(left) / scale)
    return Rounding(network, made, least, "truncated singular values")


def _truncate(
    tensors: list[Tensor],
    terms: Sequence[tuple[str, ...]],
    bond: str,
    giver: int,
    taker: int,
    keep: int | None,
    room: float,
) -> float:
    """Truncate a bond of the centre and move the centre across it.

    Args:
        tensors: changed in place.
        terms: the legs of the tensors.
        bond: the bond.
        giver: the position of the centre.
        taker: the position of the neighbour, the next centre.
        keep: the new rank; None for the smallest one that leaves out squares of at most ``room``.
        room: see ``keep``.

    Returns:
        The sum of the squares of the singular values that were left out.
    """
    batch = shared_modes(terms[giver], terms[taker], bond)
    sides = unfold(tensors[giver], terms[giver], bond, batch)
    u, values, vh = torch.linalg.svd(sides.matrices, full_matrices=False)
    squares = values.square().reshape(-1, values.shape[-1]).sum(0).tolist()
    # What is left out if so many values are kept, from all down to none.
    tails = list(accumulate(reversed(squares), initial=0.0))[::-1]
    if keep is None:
        keep = max(1, sum(tail > room for tail in tails))
    keep = min(keep, len(squares))
    tensors[giver] = fold(sides, u.narrow(-1, 0, keep))
    factor = values.narrow(-1, 0, keep).unsqueeze(-1) * vh.narrow(-2, 0, keep)
    tensors[taker] = absorb(tensors[taker], terms[taker], bond, factor, batch)
    return float(tails[keep])


def _fitted(net: TensorNetwork, ranks: Mapping[str, int]) -> Rounding:
    """Fit the line with smaller ranks to the network, which fits itself best with its own ranks."""
    if ranks == net.ranks:
        return Rounding(rebuilt(net, wide_copies(net)), 0.0, None, "copy")
    found = fit(net, str(net.legs.unhashed), ranks, start="random", restarts=2)
    return Rounding(found.network, found.error, None, f"fit by {found.how}")


def _fitted_within(net: TensorNetwork, error: float) -> Rounding:
    """Fit with rising ranks, all the same share of those of the network, until the error is met."""
    largest = max(net.ranks.values(), default=1)
    for size in range(1, largest):
        ranks = {bond: max(1, rank * size // largest) for bond, rank in net.ranks.items()}
        found = _fitted(net, ranks)
        if found.error <= error:
            return found
    return _fitted(net, net.ranks)
