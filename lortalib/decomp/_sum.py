"""Adds networks exactly, as one network whose ranks are the sums of theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from numbers import Real

import torch
from torch import Tensor

from .._kinds import are
from ._arguments import NETWORK
from ._network import Network
from ._notation import Term
from ._tensor_network import TensorNetwork


def direct_sum(
    networks: Sequence[TensorNetwork], weights: Sequence[float] | None = None
) -> Network:
    """Make the weighted sum of networks with the same legs: a network with the sums of their ranks.

    Every parameter contains the parameters of the summands as blocks along its bonds, and zeros
    elsewhere. Each term of the contraction stays within one summand, so nothing is approximated.

    Args:
        networks: networks with the same legs and shape; their ranks may differ.
        weights: a factor for each network; 1 by default.

    Returns:
        A `Network` with parameters of its own, in the widest of the dtypes. Hashed parameters have become
        ordinary ones: a sum of two has more different entries than one vector has numbers.

    Raises:
        ValueError: no network, different legs or shapes, a wrong number of weights, or a network whose
            parameters fall into groups without a common bond, since its sum has no such form.

    Example:
        >>> from lortalib.decomp import cp
        >>> one, two = (cp((2, 2, 4, 8, 4), rank, init="normal") for rank in (3, 5))
        >>> total = direct_sum([one, two], [1.0, -0.5])
        >>> total.ranks, torch.allclose(total.dense(), one.dense() - 0.5 * two.dense(), atol=1e-6)
        ({'r': 8}, True)
    """
    if not are(NETWORK.fits)(networks):
        raise TypeError("direct_sum takes a list of networks; found something else among them")
    if not networks:
        raise ValueError("nothing to add: give at least one network")
    weights = [1.0] * len(networks) if weights is None else list(weights)
    if not all(isinstance(each, (Real, Tensor)) for each in weights):
        raise TypeError(f"weights are numbers; found {weights!r}")
    if len(weights) != len(networks):
        raise ValueError(f"{len(networks)} networks and {len(weights)} weights; give one for each")
    first = networks[0]
    for network in networks[1:]:
        if str(network.legs) != str(first.legs) or dict(network.shape) != dict(first.shape):
            raise ValueError(
                "only networks of the same legs and shape can be added; found\n"
                f"    {first.legs}  {first.shape}\n    {network.legs}  {network.shape}"
            )
    bonds = set(first.ranks)
    if not _is_whole(first.legs.terms, bonds):
        raise ValueError(
            f"the network\n    {first.legs}\nfalls apart into pieces without a common bond: the sum of "
            "two of them is none of the same legs"
        )
    scaled = weighted_parameter(first)
    sizes = {bond: sum(network.sizes[bond] for network in networks) for bond in bonds}
    blocks = [network.tensors for network in networks]
    dtype = reduce(torch.promote_types, (own[0].dtype for own in blocks))
    tensors = []
    for k, term in enumerate(first.legs.terms):
        shape = [sizes.get(leg, first.sizes[leg]) for leg in term.legs]
        total = torch.zeros(shape, dtype=dtype, device=blocks[0][k].device)
        offset = dict.fromkeys(bonds, 0)
        for network, own_blocks, weight in zip(networks, blocks, weights):
            block = total
            for axis, leg in enumerate(term.legs):
                if leg in bonds:
                    block = block.narrow(axis, offset[leg], network.sizes[leg])
                    offset[leg] += network.sizes[leg]
            own: Tensor = own_blocks[k].detach().to(total.device, total.dtype)
            block += own * weight if k == scaled else own
        tensors.append(total)
    return Network(first.legs.unhashed, tensors, first.modes)


def weighted_parameter(network: TensorNetwork) -> int:
    """Choose the parameter that takes the weights: used once, trainable if possible, and smallest.

    Raises:
        ValueError: every parameter is tied, so that a weight would count twice.
    """
    terms, owners = network.legs.terms, network.legs.owners
    once = [k for k in range(len(terms)) if owners.count(owners[k]) == 1]
    if not once:
        raise ValueError(
            f"every parameter of the network\n    {network.legs}\nis tied, so none can take a weight"
        )
    tensors = network.tensors
    return min(once, key=lambda k: (terms[k].frozen, math.prod(tensors[k].shape)))


def _is_whole(terms: Sequence[Term], bonds: set[str]) -> bool:
    """Return True if bonds join any two parameters, directly or through others."""
    reached, left = [terms[0]], list(terms[1:])
    for term in reached:
        near = [other for other in left if bonds & set(term.legs) & set(other.legs)]
        reached += near
        left = [other for other in left if other not in near]
    return not left
