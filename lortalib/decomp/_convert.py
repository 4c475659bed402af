"""Writes a network in another line: exactly where that is possible, else by a fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._arguments import check_finite, takes_network
from ._canonical import canonical, joins_all
from ._fit import fit
from ._formats import get_format
from ._legs import Legs
from ._network import Network
from ._pieces import Pieces, pieces_of
from ._ranks import Rank
from ._refine import common_factors
from ._round import round as rounded
from ._tensor_network import TensorNetwork
from ._tree import is_tree


@dataclass(frozen=True)
class Conversion:
    """A network in another line.

    Attributes:
        network: the network.
        error: the relative error; zero for an exact conversion without rounding.
        is_exact: whether nothing but rounding errors of the dtype was lost.
        how: the name of the construction or algorithm.

    Example:
        >>> from lortalib.decomp import convert, cp
        >>> found = convert(cp((2, 2, 2, 8, 4), rank=2, init="normal"), "tucker")
        >>> found.is_exact, found.network.ranks["p"]
        (True, 2)
    """

    network: Network
    error: float
    is_exact: bool
    how: str


@takes_network
def convert(net: TensorNetwork, line: str, rank: Rank | None = None) -> Conversion:
    """Write a network in another line.

    Exact conversions exist from CP (one bond that joins all parameters) to every line whose parameters
    hold its modes, and from every network to Tucker, if the core is smaller than the tensor. Their ranks
    are what the construction needs. All other conversions are fits, whose rank has to be given.

    Args:
        net: the network. The whole tensor is not formed.
        line: the name of a format, or a line of legs.
        rank: ranks as for `network`. If they are given, an exact conversion to a tree is rounded to them,
            and any other conversion is a fit.

    Returns:
        `Conversion`, which says whether it is exact. Parameters of its own, in the dtype of the network.

    Raises:
        ValueError: no rank, and no exact conversion; see also `fit`.
        LegsError: a line that does not fit the modes.

    Example:
        >>> from lortalib.decomp import cp
        >>> net = cp({"layer": 3, "in": 8, "out": 4}, 2, init="normal")
        >>> found = convert(net, "tt")
        >>> found.is_exact, found.network.ranks
        (True, {'a': 2, 'b': 2})
    """
    check_finite(net, "a conversion")
    legs = get_format(line).legs(net.shape)
    legs.check(net.modes)
    exact = _exact(net, legs)
    if exact is None and rank is None:
        raise ValueError(
            f"there is no exact way from\n    {net.legs}\nto\n    {legs}\nGive rank= to fit the second "
            "line to the first"
        )
    if exact is not None and rank is None:
        return Conversion(exact[0], 0.0, True, exact[1])
    assert rank is not None
    if exact is not None and is_tree(legs, net.modes):
        found = rounded(exact[0], rank=rank)
        is_exact = found.error < 1e-14
        return Conversion(found.network, found.error, is_exact, f"{exact[1]}, {found.how}")
    fitted = fit(net, line, rank, restarts=2)
    return Conversion(fitted.network, fitted.error, False, f"fit by {fitted.how}")


def _exact(net: TensorNetwork, legs: Legs) -> tuple[Network, str] | None:
    """Convert exactly, if a construction exists; return the network and the construction's name."""
    if str(legs) == str(net.legs):
        copies = [tensor.detach().clone() for tensor in net.stored]
        own = [copies[k] for k in legs.holders]
        return Network(legs, own, net.modes, sizes=net.sizes), "copy"
    if legs.vectors or any(term.frozen or term.tied for term in legs.terms):
        return None
    if str(legs) == str(get_format("tucker").legs(net.shape)):
        core = _as_tucker(net, legs)
        if core is not None:
            return core, "factors of each mode and their core"
        return None
    spread = _spread(net, legs)
    if spread is None:
        return None
    if is_tree(legs, net.modes):
        spread = canonical(
            canonical(spread, root=0)
        )  # ranks that rows cannot fill shrink, from both ends
    return spread, "superdiagonal bonds"


def _as_tucker(net: TensorNetwork, legs: Legs) -> Network | None:
    """Factor each mode of a network out of the parameter that carries it; the rest becomes the core."""
    pieces = pieces_of(net)
    terms, tensors = list(pieces.terms), [tensor.detach() for tensor in pieces.tensors]
    factors: dict[str, Tensor] = {}
    ends: dict[str, tuple[str, ...]]  # the legs that each bond is made of
    ends = {bond: (bond + "'",) for bond in legs.terms[-1].legs}
    bond_of = {term.legs[0]: term.legs[1] for term in legs.terms[:-1]}
    mode_of_bond = {bond: mode for mode, bond in bond_of.items()}
    for mode, bond in bond_of.items():
        own, fresh = net.legs.open_legs([mode]), bond + "'"
        if own != (mode,):
            factors[mode], ends[bond] = torch.eye(net.shape[mode]).to(tensors[0]), own
            continue
        carriers = net.legs.carriers[mode]
        k = carriers[0]
        axis = terms[k].index(mode)
        matrix = tensors[k].movedim(axis, 0)
        rest = math.prod(matrix.shape[1:])
        if len(carriers) == 1 and rest < net.sizes[mode]:
            q, r = torch.linalg.qr(matrix.reshape(-1, rest).double())
            factors[mode] = q.to(matrix)
            tensors[k] = r.to(matrix).reshape(-1, *matrix.shape[1:]).movedim(0, axis)
        else:
            factors[mode] = torch.eye(net.sizes[mode]).to(matrix)
        terms = [tuple(fresh if leg == mode else leg for leg in term) for term in terms]
    if math.prod(factor.shape[1] for factor in factors.values()) >= net.shape.numel:
        return None
    core = Pieces(tuple(terms), tuple(tensors)).contract(
        [leg for own in ends.values() for leg in own]
    )
    core = core.reshape([factors[mode_of_bond[bond]].shape[1] for bond in ends])
    return Network(legs, [*(factors[mode] for mode in bond_of), core], net.modes)


def _spread(net: TensorNetwork, legs: Legs) -> Network | None:
    """Write the components of CP in another line, where both are split into common factors."""
    sizes = legs.split(net.shape)
    try:
        fine = common_factors(net.shape, [(net.legs, net.sizes), (legs, sizes)])
    except ValueError:
        return None
    found = _spread_components(fine.of(net), fine.legs(legs, sizes, net.modes))
    if found is None:
        return None
    return Network(legs, fine.undone(found.tensors, legs, {**found.ranks, **sizes}), net.modes)


def _spread_components(net: TensorNetwork, legs: Legs) -> Network | None:
    """Write the components of CP in another line, whose bonds all number the components.

    None if the network is no CP, if a parameter has modes that no parameter of the line has together, or
    if the line falls into pieces.
    """
    bond = joins_all(net)
    bonds = legs.bonds(net.modes)
    if bond is None:
        return None
    places = []
    for term in net.legs.terms:
        own = set(term.legs) - {bond}
        fitting = [k for k, other in enumerate(legs.terms) if own <= set(other.legs)]
        if not fitting:
            return None
        places.append(fitting[0])
    numbering = _spanning_bonds(legs, bonds)
    if numbering is None:
        return None
    rank = net.ranks[bond]
    like = net.tensors[0]
    sizes = {**net.shape, **{name: rank if name in numbering else 1 for name in bonds}}
    tensors = []
    for k, term in enumerate(legs.terms):
        found = [j for j, place in enumerate(places) if place == k]
        parts = [
            tuple("#" if leg == bond else leg for leg in net.legs.terms[j].legs) for j in found
        ]
        filled = [net.tensors[j].detach() for j in found]
        # Legs that nothing fills yet, and the diagonal that gives all bonds the component's number.
        parts.append(tuple(leg for leg in term.legs if leg in net.modes))
        filled.append(like.new_ones([sizes[leg] for leg in parts[-1]]))
        parts.append(("#", *(leg for leg in term.legs if leg in bonds)))
        filled.append(_diagonal(rank, [sizes[leg] for leg in parts[-1][1:]], like))
        tensors.append(Pieces(tuple(parts), tuple(filled)).contract(term.legs))
    return Network(legs, tensors, net.modes)


def _diagonal(rank: int, sizes: Sequence[int], like: Tensor) -> Tensor:
    """Make ones where all indices that count to ``rank`` are equal, and zeros elsewhere."""
    tensor = like.new_zeros([rank, *sizes])
    for k in range(rank):
        tensor[(k, *(k if size == rank else 0 for size in sizes))] = 1
    return tensor


def _spanning_bonds(legs: Legs, bonds: Sequence[str]) -> set[str] | None:
    """Choose bonds that join all parameters, the widest first and none without need."""
    groups = [{k} for k in range(len(legs.terms))]
    chosen = set()
    for bond in sorted(bonds, key=lambda bond: -len(legs.carriers[bond])):
        touched = [group for group in groups if group & set(legs.carriers[bond])]
        if len(touched) > 1:
            chosen.add(bond)
            groups = [g for g in groups if g not in touched] + [set().union(*touched)]
    return chosen if len(groups) == 1 else None
