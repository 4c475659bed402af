"""Prepares sites for tensors that act on the residual stream: S[layer, matrix, in, out] instead of T.

A projection that reads the residual stream reads ``x + x S`` instead of x; a projection that writes to it
writes ``y + y S`` instead of y (without the bias). The frozen weight maps to the other side, so S has no
heads, and the sites of one weight become one site.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from ._anatomy import Site, UnsupportedModelError
from ._base_weights import weight_name
from ._config import AdapterConfig


def stream_sites(sites: Iterable[Site]) -> list[Site]:
    """Make the sites of a tensor on the stream: one site for each weight, with one head and all features.

    The role of a fused projection joins the roles of its parts: ``"q+k+v"``.

    Args:
        sites: the sites of the model.

    Raises:
        UnsupportedModelError: only a part of a fused projection is among the sites.

    Example:
        >>> site = Site("decoder", 0, "q", "q_proj", heads=4, query_heads=4, head_dim=8, width=16,
        ...             writer=False)
        >>> [(each.role, each.heads, each.head_dim) for each in stream_sites([site])]
        [('q', 1, 32)]
    """
    members: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        members[weight_name(site)].append(site)
    return [_joined(name, parts) for name, parts in members.items()]


def _joined(name: str, parts: Sequence[Site]) -> Site:
    """Join the sites of one weight to one site."""
    first = parts[0]
    features = sum(site.features for site in parts)
    if not first.writer and first.fused not in (None, features):
        raise UnsupportedModelError(
            f"{name} has {first.fused} features, of which {features} are asked for "
            f"({', '.join(site.role for site in parts)}). A tensor on the stream changes what the whole "
            "module reads: name all of its parts in targets, leave the module out, or use "
            "acts_on='weights'"
        )
    return replace(
        first,
        role="+".join(site.role for site in parts),
        heads=1,
        query_heads=1,
        # All that the module writes, also of an MLP beside the heads.
        head_dim=first.fused or features,
        rows=None,
        fused=None,
    )


class OnModel(Protocol):
    """The interface of an adapter that the checks of merged and active adapters use."""

    name: str
    active: bool
    merged: bool
    config: AdapterConfig

    @property
    def sites(self) -> list[Site]:
        """Every projection that the adapter updates."""


def check_order(merged: Iterable[OnModel], unmerged: Iterable[OnModel]) -> None:
    """Refuse a state in which an active tensor on the stream acts on a weight with other merged adapters.

    For a merged weight W, ``W (x + x S)`` contains the product of the two updates, which belongs to neither
    adapter.

    Args:
        merged: the adapters that would be merged into the weights.
        unmerged: the adapters that would be active and not merged.

    Raises:
        ValueError: there is such a weight.
    """
    into = {weight_name(site): adapter.name for adapter in merged for site in adapter.sites}
    for adapter in unmerged:
        if adapter.config.acts_on != "stream":
            continue
        for site in adapter.sites:
            other = into.get(weight_name(site))
            if other is not None:
                raise ValueError(
                    f"adapter {adapter.name!r} acts on the stream that {site.path} reads or writes, so "
                    f"{other!r} cannot stand in that weight while {adapter.name!r} is active and not "
                    f"merged. Call disable() on {adapter.name!r} first; merge() makes it take part again. Or "
                    f"make {other!r} part of the base for good: remove(merged=True)"
                )


def check_kept(adapter: OnModel, merged: Iterable[OnModel]) -> None:
    """Refuse to make an update part of a weight that a merged adapter on the stream multiplies.

    Args:
        adapter: the adapter whose update would become part of the base.
        merged: the other merged adapters.

    Raises:
        ValueError: one of them acts on the stream, at a weight of the adapter.
    """
    names = {weight_name(site) for site in adapter.sites}
    for other in merged:
        if other.config.acts_on == "stream" and names & {weight_name(s) for s in other.sites}:
            raise ValueError(
                f"adapter {other.name!r} acts on the stream and is merged into weights of "
                f"{adapter.name!r}; if those became part of the base, its update would be another. Unmerge "
                f"or remove {other.name!r} first"
            )
