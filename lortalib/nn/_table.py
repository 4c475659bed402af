"""Describes an adapter in a table of its networks, and counts their parameters and those of a LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from torch import nn

from .._columns import aligned
from ..decomp import Network, TensorNetwork
from ._anatomy import Site
from ._config import AdapterConfig
from ._group import Group
from ._trained_modules import TrainedModules


class Described(Protocol):
    """The interface of an adapter that its description uses."""

    name: str
    config: AdapterConfig
    groups: tuple[Group, ...]
    tasks: tuple[str, ...]
    active: bool
    merged: bool
    trained_modules: TrainedModules

    @property
    def sites(self) -> list[Site]:
        """Every projection that the adapter updates."""

    @property
    def is_on_model(self) -> bool:
        """True while the adapter is on a model."""

    @property
    def model(self) -> nn.Module:
        """The model that the adapter is on."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the adapter's networks."""

    def count(self) -> int:
        """Count the parameters of the adapter's networks."""


def describe(adapter: Described, networks: Mapping[str, TensorNetwork]) -> str:
    """Describe the networks of an adapter and their parameter counts, and the count of a LoRA in its place.

    Args:
        adapter: the adapter.
        networks: the networks by name of the group.
    """
    config = adapter.config
    rank = max((n for net in networks.values() for n in net.ranks.values()), default=1)
    model = adapter.model if adapter.is_on_model else None
    owner = f" on {type(model).__name__}" if model is not None else ", on no model"
    state = "merged" if adapter.merged else "active" if adapter.active else "not active"
    count, lora = adapter.count(), lora_count(adapter.groups, rank)
    part = ""
    if model is not None:
        ours = {id(p) for p in adapter.parameters()}
        base = sum(p.numel() for p in model.parameters() if id(p) not in ours)
        part = f", {100 * count / base:.3g} % of the model's {base:,}"
    lines = [
        f"Adapter {adapter.name!r}{owner} ({state}): {config.decomposition}, "
        f"scaling {config.scaling:g}, dropout {config.dropout:g}",
        *network_table(adapter.groups, networks),
        f"  {count:,} trainable parameters{part}; LoRA of rank {rank} on these {len(adapter.sites)} "
        f"projections has {lora:,} ({lora / max(1, count):.3g} times as many)",
    ]
    if adapter.tasks:
        lines.append(f"  tasks: {', '.join(adapter.tasks)}")
    if adapter.trained_modules.paths:
        lines.append(f"  trained as a whole: {', '.join(adapter.trained_modules.paths)}")
    return "\n".join(lines)


def network_table(groups: Iterable[Group], networks: Mapping[str, TensorNetwork]) -> list[str]:
    """Return the lines of a table: a line of headings, then a line for each network.

    Args:
        groups: the groups.
        networks: the networks by name of the group.
    """
    rows = [("stack", "matrices", "layers", "heads", "in", "out", "legs", "ranks", "parameters")]
    for group in groups:
        network, shape = networks[group.name], group.shape
        ranks = {**network.ranks, **network.vectors}
        alike = len(set(ranks.values())) == 1
        sizes = (
            [str(next(iter(ranks.values())))] if alike else [f"{b}={n}" for b, n in ranks.items()]
        )
        rows.append(
            (
                group.sites[0].stack,
                " ".join(group.roles),
                str(shape["layer"]),
                str(shape.get("head", "-")),
                f"{shape['in']:,}",
                f"{shape['out']:,}",
                str(network.legs),
                " ".join(sizes),
                f"{network.count():,}",
            )
        )
    return ["  " + line for line in aligned(rows)]


def count_parameters(
    networks: Iterable[Network], trainable_only: bool = True, *, shared: bool = True
) -> int:
    """Count the parameters of networks; one that several networks have in common counts once.

    Args:
        networks: the networks.
        trainable_only: whether parameters marked ``(frozen)`` are left out.
        shared: whether parameters marked ``(shared)`` are counted.
    """
    sizes = {
        id(tensor): tensor.numel()
        for network in networks
        for tensor, term in zip(network.stored, network.legs.terms)
        if not (trainable_only and term.frozen) and (shared or not term.shared)
    }
    return sum(sizes.values())


def lora_count(groups: Iterable[Group], rank: int) -> int:
    """Count the parameters of PEFT's LoRA of this rank on the modules of these groups.

    A fused projection is one module with one pair; packed experts have a pair for each expert.

    Args:
        groups: the groups.
        rank: rank of the LoRA.
    """
    modules = {
        (site.path, site.parameter): max(1, site.experts)
        * ((site.fused or site.features) + site.width)
        for group in groups
        for site in group.sites
    }
    return rank * sum(modules.values())
