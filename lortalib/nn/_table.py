"""Tensors of an adapter in words: a table of its networks, and how many parameters a LoRA would have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..decomp import TensorNetwork
from ._group import Group


def network_table(groups: Iterable[Group], networks: Mapping[str, TensorNetwork]) -> list[str]:
    """A line for each network, below a line of heads.

    Args:
        groups: the groups.
        networks: by name of the group.
    """
    rows = [("stack", "matrices", "layers", "heads", "in", "out", "legs", "ranks", "parameters")]
    for group in groups:
        network, shape = networks[group.name], group.shape
        ranks = network.ranks
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
    columns = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  " + "  ".join(cell.ljust(n) for cell, n in zip(row, columns)).rstrip() for row in rows
    ]


def lora_count(groups: Iterable[Group], rank: int) -> int:
    """How many parameters PEFT's LoRA of this rank has on the modules of these groups.

    A fused projection is one module with one pair; packed experts have a pair for each expert.

    Args:
        groups: the groups.
        rank: of the LoRA.
    """
    modules = {
        (site.path, site.parameter): max(1, site.experts)
        * ((site.fused or site.features) + site.width)
        for group in groups
        for site in group.sites
    }
    return rank * sum(modules.values())
