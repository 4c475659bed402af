"""Weighted sums of adapters, exact: networks whose ranks add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..decomp import Network, direct_sum
from ..nn import Adapter


def weighted_sum(owners: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Network]:
    """The networks of the weighted sum of adapters, by name of their group; scalings are in them.

    Raises:
        ValueError: the adapters are not on the same modules, or of unlike decompositions.
    """
    networks = {}
    for group in owners[0].groups:
        if any(group not in owner.groups for owner in owners):
            raise ValueError(
                f"the adapters {[owner.name for owner in owners]} are not on the same modules, so no network "
                "of one rank is their sum"
            )
        parts = [owner.network(group) for owner in owners]
        factors = [float(weight) * owner.scaling for weight, owner in zip(weights, owners)]
        networks[group.name] = direct_sum(parts, factors)
    return networks


def of_ranks(like: Network, ranks: Mapping[str, int], device: torch.device) -> Network:
    """A network of zeros with the line of another and ranks of its own."""
    sizes = {**like.shape, **ranks}
    shapes = [[sizes[leg] for leg in term.legs] for term in like.legs.terms]
    return Network(like.legs, [torch.zeros(shape, device=device) for shape in shapes], like.shape)
