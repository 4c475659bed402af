"""Makes exact weighted sums of adapters, as networks whose ranks add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from reprlib import repr as short

import torch

from ..decomp import Network, direct_sum
from ..nn import Adapter, Site
from ..nn.door import Plan
from ._config import LortaConfig


def check_sum(
    known: Sequence[str], names: Sequence[str], weights: Sequence[float], name: str, kind: str
) -> None:
    """Check the arguments of a weighted sum.

    Args:
        known: names of the adapters of the model.
        names: names of the adapters to add.
        weights: a factor for each adapter.
        name: name of the sum.
        kind: the combination type.

    Raises:
        ValueError: an adapter is unknown, the numbers of adapters and weights differ, the name is in use,
            or the kind is not ``"cat"``.
    """
    if kind != "cat":
        raise ValueError(f"combination_type must be 'cat', the exact sum; found {kind!r}")
    if not names or len(names) != len(weights) or not set(names) <= set(known):
        raise ValueError(
            f"asked to add {list(names)} with the weights {list(weights)}; a weight is needed for each, and "
            f"the adapters are {', '.join(known)}"
        )
    if name in known:
        raise ValueError(f"there already is an adapter called {name!r}")


def weighted_sum(owners: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Network]:
    """Make the networks of the weighted sum of adapters, by name of their group. The networks include the
    adapters' scalings.

    Raises:
        ValueError: the adapters have different modules or decompositions.
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


def describe_sum(
    config: LortaConfig, owners: Sequence[Adapter], networks: Mapping[str, Network]
) -> None:
    """Turn the configuration of a summand into that of the sum.

    If parameters of the summands are hashed, the parameters of the sum are not, because the sum has more
    different entries than the vectors of the summands. Its decomposition is then the line of its networks.

    Args:
        config: a copy of the configuration of a summand.
        owners: the summands.
        networks: the networks of the sum, by name of their group.

    Raises:
        ValueError: the summands are hashed, and the networks have different lines.
    """
    config.alpha, config.init_weights = 1.0, True
    config.ranks = {name: dict(network.ranks) for name, network in networks.items()}
    if not any(owner.network(group).vectors for owner in owners for group in owner.groups):
        return
    lines = {str(network.legs): network.ranks for network in networks.values()}
    if len(lines) > 1:
        raise ValueError(
            f"the parameters of {config.decomposition!r} are hashed, and those of a sum are not; the lines "
            f"of its networks differ, so no decomposition names them all: {'; '.join(lines)}. Add the "
            "adapters as exported LoRA"
        )
    ((config.decomposition, bonds),) = lines.items()
    if isinstance(config.rank, dict):
        config.rank = {bond: size for bond, size in config.rank.items() if bond in bonds}


def with_ranks(
    planned: Plan,
    ranks: Mapping[str, Mapping[str, int]],
    device: torch.device | Callable[[Site], torch.device],
) -> Plan:
    """Make a copy of a plan with other ranks and with zeros in its networks.

    Args:
        planned: the plan, which gives the lines and the modes.
        ranks: rank by network and bond, as ``add_weighted_adapter`` writes them into a configuration.
        device: device of the networks, or a function from the first site of each network to its device.

    Raises:
        ValueError: networks or bonds differ from those of the plan, or a rank is below 1.
    """
    wanted = {
        group.name: {*net.ranks, *net.vectors}
        for group in planned.groups
        for net in [planned.networks[group.name]]
    }
    found = {name: set(own) for name, own in ranks.items()}
    if found != wanted or any(rank < 1 for own in ranks.values() for rank in own.values()):
        bonds = "; ".join(f"{name}: {', '.join(sorted(own))}" for name, own in wanted.items())
        raise ValueError(
            f"ranks must give a size of at least 1 for each bond of each network ({bonds}); found "
            f"{short(ranks)}. Leave it out, and let rank say the same for all"
        )
    networks = {}
    for group in planned.groups:
        like = planned.networks[group.name]
        sizes = {**like.sizes, **ranks[group.name]}
        place = device(group.sites[0]) if callable(device) else device
        zeros = [torch.zeros(shape, device=place) for shape in like.legs.stored_shapes(sizes)]
        networks[group.name] = Network(like.legs, zeros, like.shape, sizes=sizes)
    return Plan(planned.groups, networks, planned.config)
