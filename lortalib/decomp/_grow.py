"""Gives a trained network larger ranks without changing its tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._kinds import GENERATOR, takes
from ._build import normal_numbers
from ._canonical import wide_copies
from ._network import Network
from ._rank_change import BondMap, RankChange, changed, refuse_fixed
from ._ranks import Rank, read_ranks
from ._start import get_start
from ._tensor_network import TensorNetwork


@takes(generator=GENERATOR)
def grow(net: Network, rank: Rank, *, generator: torch.Generator | None = None) -> RankChange:
    """Give a network larger ranks, with new directions that contribute nothing yet.

    Of the parameters of each bond, the one nearest to the parameter that starts at zero in training gets
    zeros for the new positions; all others get new numbers, drawn as for a new network. So the tensor does
    not change, and the zeros have a gradient, as the zero parameter of a new network has.

    Args:
        net: the network; it stays as it is.
        rank: ranks as for `network`, or a mapping with some bonds. Smaller ones than those of the network
            stay as they are, and larger ones than the modes can fill are reduced.
        generator: the source of randomness; by default torch's global one.

    Returns:
        `RankChange` with the error 0.

    Raises:
        ValueError: a frozen or hashed parameter, whose numbers are not free; numbers that are not finite; a
            rank below 1, a wrong number of ranks or an unknown bond; a bond on tied parameters alone.

    Example:
        >>> import torch
        >>> from lortalib.decomp import tt
        >>> net = tt({"layer": 3, "in": 8, "out": 4}, 1, init="normal")
        >>> found = grow(net, 3)
        >>> found.network.ranks, torch.allclose(found.network.dense(), net.dense())
        ({'a': 3, 'b': 3}, True)
    """
    refuse_fixed(net, "raise")
    wanted = read_ranks(net.legs, net.modes, rank, net.ranks)
    limits = net.legs.limits({**net.sizes, **wanted}, net.modes)
    ranks = {bond: max(size, limits[bond]) for bond, size in net.ranks.items()}
    zeros = {bond: _zero_end(net, bond) for bond in ranks if ranks[bond] > net.sizes[bond]}
    device = net.tensors[0].device
    randn = normal_numbers(generator, device, torch.float64)
    # Not a new network, which would have no ranks beyond those that the modes can fill, as this one may.
    fresh = get_start("normal")(net.legs, {**net.sizes, **ranks}, net.open_legs, randn)
    tensors = [
        _widened(term.legs, old, fresh[owner].to(old), [b for b, end in zeros.items() if end == k])
        for k, (term, old, owner) in enumerate(
            zip(net.legs.terms, wide_copies(net), net.legs.owners, strict=True)
        )
    ]
    maps = tuple(
        {
            bond: _as_identity(ranks[bond], net.sizes[bond], device)
            for bond in term.legs
            if bond in zeros
        }
        for term in net.legs.terms
    )
    return RankChange(changed(net, tensors), 0.0, maps)


def _widened(legs: Sequence[str], old: Tensor, new: Tensor, zeros: Sequence[str]) -> Tensor:
    """Put a parameter into the first positions of a larger one, whose other positions along some bonds are
    zero."""
    found = new.clone()
    for bond in zeros:
        axis = legs.index(bond)
        found.narrow(axis, old.shape[axis], found.shape[axis] - old.shape[axis]).zero_()
    found[tuple(slice(size) for size in old.shape)] = old
    return found


def _as_identity(new: int, old: int, device: torch.device) -> BondMap:
    rows = torch.eye(new, old, dtype=torch.float64, device=device)
    return BondMap(rows, rows)


def _zero_end(net: TensorNetwork, bond: str) -> int:
    """Choose the parameter of a bond that gets zeros: the nearest to the root that is used once."""
    owners = net.legs.owners
    once = [k for k in net.legs.carriers[bond] if owners.count(owners[k]) == 1]
    if not once:
        raise ValueError(
            f"the bond {bond!r} is on tied parameters alone, where new directions that contribute nothing "
            f"would have no gradient, in\n    {net.legs}"
        )
    steps = _steps_from_root(net)
    return min(once, key=lambda k: steps.get(k, len(owners)))


def _steps_from_root(net: TensorNetwork) -> Mapping[int, int]:
    """Count the bonds between the parameter that starts at zero and every other one."""
    steps, queue = {net.legs.zero: 0}, [net.legs.zero]
    for near in queue:
        for bond in net.legs.terms[near].legs:
            for k in net.legs.carriers[bond] if bond in net.ranks else ():
                if k not in steps:
                    steps[k] = steps[near] + 1
                    queue.append(k)
    return steps
