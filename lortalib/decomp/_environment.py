"""Describes what surrounds a parameter of a network: its environment and its Gram matrix."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ._arguments import takes_network
from ._einsum import Names, compile_constant
from ._legs import Legs
from ._pieces import Pieces, joined, pieces_of, position_of
from ._tensor_network import NetworkView, TensorNetwork


@takes_network
def environment(net: TensorNetwork, parameter: str | int) -> TensorNetwork:
    """Take one parameter out of a network; the rest is a network over the parameter's bonds.

    The tensor is linear in the parameter: for every entry, it is the sum over the bonds of the parameter
    times the environment. Nothing is contracted, so no large tensor is made before ``dense`` is called.

    Args:
        net: the network.
        parameter: a name of ``net.names``, or a position in the line.

    Returns:
        A network whose modes are the bonds of the parameter, in the order of its legs, followed by the
        modes that other parameters carry; a split mode is there as its factors. It uses the same parameters,
        with live gradients.

    Raises:
        KeyError: no such parameter.
        ValueError: the network has no other parameter.

    Example:
        >>> import torch
        >>> from lortalib.decomp import cp
        >>> net = cp({"layer": 3, "in": 8, "out": 4}, 2, init="normal")
        >>> rest = environment(net, "layer_r")
        >>> rest.shape
        Shape({'r': 2, 'in': 8, 'out': 4})
        >>> again = torch.einsum("lr,rio->lio", net.tensors[2], rest.dense())
        >>> torch.allclose(again, net.dense(), atol=1e-6)
        True
    """
    k = position_of(net, parameter)
    if len(net.names) == 1:
        raise ValueError(f"nothing surrounds the only parameter of the network\n    {net.legs}")
    kept = [j for j in range(len(net.names)) if j != k]
    terms = tuple(net.legs.terms[j] for j in kept)
    carried = {leg for term in terms for leg in term.legs}
    bonds = tuple(leg for leg in net.legs.terms[k].legs if leg not in net.open_legs)
    modes = (*bonds, *(leg for leg in net.open_legs if leg in carried))
    return NetworkView(Legs(terms), [net.tensors[j] for j in kept], modes)


@takes_network
def gram(net: TensorNetwork, parameter: str | int) -> Tensor:
    """Compute the Gram matrix of a parameter's environment over the parameter's bonds.

    It is the matrix of the normal equations of the parameter, which least squares solves. The
    environment itself is not formed.

    Args:
        net: the network.
        parameter: a name of ``net.names``, or a position in the line.

    Returns:
        Matrices (b, b), where b is the product of the parameter's bonds in the order of its legs. Modes
        that the parameter shares with other parameters are leading axes, in the order of its legs: each
        of their positions has a Gram matrix of its own. Differentiable.

    Raises:
        KeyError: no such parameter.

    Example:
        >>> from lortalib.decomp import lora, rescal
        >>> gram(lora((3, 2, 4, 8, 4), 2, init="normal"), "layer_matrix_in_r").shape
        torch.Size([3, 4, 2, 2])
        >>> stream = {"layer": 3, "matrix": 2, "in": 6, "out": 6}
        >>> gram(rescal(stream, 2, init="normal"), 2).shape  # the core has the bonds p and q
        torch.Size([4, 4])
    """
    k = position_of(net, parameter)
    legs = net.legs.terms[k].legs
    rest = pieces_of(net).without(k)
    bonds = [leg for leg in legs if leg not in net.open_legs]
    carried = {leg for term in rest.terms for leg in term}
    shared = [leg for leg in legs if leg in net.open_legs and leg in carried]
    size = math.prod(net.sizes[bond] for bond in bonds)
    if not rest.terms:
        return net.tensors[k].new_ones(1, 1)
    both = joined(rest, rest.renamed("'", net.open_legs))
    found = both.contract([*shared, *bonds, *(bond + "'" for bond in bonds)])
    return found.reshape(*(net.sizes[mode] for mode in shared), size, size)


class GramPart(NamedTuple):
    """A factor of a Gram matrix, which is the Kronecker product of its factors.

    Attributes:
        modes: legs of the parameter that number the matrices.
        bonds: legs of the parameter that the matrices act on.
        matrices: (*modes, b, b), b the product of the bonds.
    """

    modes: Names
    bonds: Names
    matrices: Tensor


def gram_parts(
    pieces: Pieces, position: int, modes: Names, weight: Pieces | None = None
) -> list[GramPart]:
    """Compute the Gram matrix of a parameter as a Kronecker product, which stays small.

    Without the parameter a tree falls apart: each piece acts on bonds of its own. So the Gram matrix of
    a core of Tucker has a factor for each bond, and that of a core of a train has one for each side.

    Args:
        pieces: the tensors of the network.
        position: the position of the parameter.
        modes: the modes of the network.
        weight: the tensors of a weight for each entry; None for weights of one.
    """
    weights = weight or Pieces((), ())
    tensors, parts = pieces.tensors + weights.tensors, []
    for plan in _plans(pieces.terms, weights.terms, position, modes):
        own = Pieces(plan.terms, tuple([tensors[k] for k in plan.places]))
        found, lead = own.contract(plan.axes), len(plan.modes)
        size = math.prod(found.shape[lead : lead + len(plan.bonds)])
        matrices = found.reshape(*found.shape[:lead], size, size)
        parts.append(GramPart(plan.modes, plan.bonds, matrices))
    return parts


class _PartPlan(NamedTuple):
    """How a part of the Gram matrix of a parameter is contracted.

    Attributes:
        modes, bonds: as of `GramPart`.
        places: positions of its tensors among those of the network, followed by the weights.
        terms: their legs.
        axes: the axes of the result.
    """

    modes: Names
    bonds: Names
    places: tuple[int, ...]
    terms: tuple[Names, ...]
    axes: Names


@compile_constant
def _plans(
    terms: tuple[Names, ...], weights: tuple[Names, ...], position: int, modes: Names
) -> list[_PartPlan]:
    """Plan the parts of the Gram matrix of a parameter. It is cached, since a fit asks in every sweep."""
    legs, number = terms[position], len(terms)
    rest = [k for k in range(number) if k != position]
    places = [*rest, *rest, *range(number, number + len(weights))]
    own = tuple(terms[k] for k in rest)
    copies = tuple(tuple(leg if leg in modes else leg + "'" for leg in term) for term in own)
    every, found = own + copies + weights, []
    for group in _groups(every, len(rest), set(legs) & set(modes)):
        carried = {leg for k in group for leg in every[k]}
        batch = tuple(leg for leg in legs if leg in modes and leg in carried)
        bonds = tuple(leg for leg in legs if leg not in modes and leg in carried)
        axes = (*batch, *bonds, *(bond + "'" for bond in bonds))
        chosen = tuple(every[k] for k in group)
        found.append(_PartPlan(batch, bonds, tuple(places[k] for k in group), chosen, axes))
    return found


def _groups(terms: tuple[Names, ...], half: int, apart: set[str]) -> list[list[int]]:
    """Group terms that have a leg in common which is not in ``apart``; term k and its copy k + half are
    in one group."""
    group = list(range(len(terms)))

    def root(k: int) -> int:
        while group[k] != k:
            k = group[k]
        return k

    met: dict[str, int] = {}
    for k, term in enumerate(terms):
        if half <= k < 2 * half:
            group[root(k)] = root(k - half)
        for leg in term:
            if leg not in apart:
                group[root(k)] = root(met.setdefault(leg, k))
    found: dict[int, list[int]] = {}
    for k in range(len(terms)):
        found.setdefault(root(k), []).append(k)
    return list(found.values())
