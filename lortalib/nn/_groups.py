"""Which sites share one tensor: those of a stack whose head count and widths are equal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Union

from torch import Tensor, nn

from ..decomp import Cut, Network, Shape
from ._site import ROLES, Site

#: The letters of targets; queries and keys may pass through latents of their own.
_LATENT = {"q": ("q", "q_a"), "k": ("k", "kv_a"), "v": ("v", "kv_a"), "o": ("o",)}

Targets = Union[str, Sequence[str], Callable[[Site], bool]]


@dataclass(frozen=True)
class Group:
    """Sites that share one tensor T[layer, head, matrix, in, out].

    Attributes:
        name: name of the group's network in the adapter, unique there.
        heads: size of the mode ``head``; a multiple of the heads of each site.
        sites: ordered by layer and role.
        layers: layer index of the model for each position of the mode ``layer``.
        roles: role for each position of the mode ``matrix``.
    """

    name: str
    heads: int
    sites: tuple[Site, ...]
    layers: tuple[int, ...]
    roles: tuple[str, ...]

    @property
    def shape(self) -> Shape:
        """Shape of the group's tensor."""
        site = self.sites[0]
        expert = {"expert": site.experts} if site.experts else {}
        return Shape(
            {
                "layer": len(self.layers),
                **expert,
                "head": self.heads,
                "matrix": len(self.roles),
                "in": site.width,
                "out": site.head_dim,
            }
        )

    def _index(self, site: Site) -> dict[str, int]:
        return {"layer": self.layers.index(site.layer), "matrix": self.roles.index(site.role)}

    def pair(self, network: Network, site: Site) -> Cut:
        """The low-rank pair of one site, before scaling: A (p, width), B (heads*head_dim, p).

        Where the tensor has the query heads and the site has fewer (grouped queries), each of the
        site's heads takes the mean of its group.
        """
        cut = network.select(**self._index(site)).cut()
        if site.heads == self.heads:
            return cut
        return Cut(cut.A, pool_heads(cut.B.mT, self.heads, site.heads).mT)

    def dense(self, network: Network, site: Site) -> Tensor:
        """The update of one site before scaling: (heads*head_dim, width), with a leading axis for
        packed experts."""
        if not site.experts:
            a, b = self.pair(network, site)
            return b @ a
        order = ("expert", "head", "out", "in")
        view = network.select(**self._index(site))
        dense = view.dense().permute([view.modes.index(mode) for mode in order])
        return dense.reshape(site.experts, site.features, site.width)


def pool_heads(b: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Mean over the query heads of each group: (..., heads*head_dim) to (..., kv_heads*head_dim)."""
    grouped = b.unflatten(-1, (kv_heads, heads // kv_heads, b.shape[-1] // heads))
    pooled: Tensor = grouped.mean(-2).flatten(-2)
    return pooled


def group_sites(sites: Iterable[Site], gqa: str) -> list[Group]:
    """Divide sites into groups of equal stack, heads, width and head_dim.

    Args:
        sites: what to group.
        gqa: ``"pool"`` gives keys and values the query heads, so that they share the queries'
            tensor; ``"split"`` gives them a tensor of their own where their head count differs.

    Raises:
        ValueError: an unknown ``gqa``.
    """
    if gqa not in ("pool", "split"):
        raise ValueError(f"gqa must be 'pool' or 'split'; found {gqa!r}")
    members: dict[tuple[str, int, int, int, int], list[Site]] = defaultdict(list)
    for site in sites:
        heads = site.query_heads if gqa == "pool" else site.heads
        members[site.stack, heads, site.width, site.head_dim, site.experts].append(site)
    stacks = [stack for stack, *_ in members]
    groups: list[Group] = []
    for (stack, heads, width, head_dim, experts), found in members.items():
        name = stack.replace(".", "_")
        if stacks.count(stack) > 1:
            name += f"_{experts}x" * bool(experts) + f"_{heads}x{head_dim}_{width}"
        while any(group.name == name for group in groups):
            name += "_"
        layers = tuple(sorted({site.layer for site in found}))
        roles = tuple(sorted({site.role: None for site in found}, key=_order))
        groups.append(Group(name, heads, tuple(found), layers, roles))
    return groups


def _order(role: str) -> int:
    """Position of a role on the mode ``matrix``; names of other projections follow as they come."""
    return ROLES.index(role) if role in ROLES else len(ROLES)


def share_input_factor(groups: Sequence[Group], networks: dict[str, Network]) -> None:
    """Give the networks of one stack one parameter for ``in``, where it has the same legs and size."""
    owners: dict[tuple[object, ...], nn.Parameter] = {}
    for group in groups:
        network = networks[group.name]
        for name, term in zip(network.names, network.legs.terms):
            if "in" in term.legs and not set(term.legs) & {"layer", "matrix", "head", "expert"}:
                own = network.get_parameter(name)
                key = (group.sites[0].stack, term.legs, own.shape)
                network.register_parameter(name, owners.setdefault(key, own))


def choose(
    sites: Sequence[Site], targets: Targets, layers: int | Iterable[int] | None
) -> list[Site]:
    """The sites that ``targets`` and ``layers`` name.

    Raises:
        ValueError: nothing is named, or a name or layer that fits no site.
    """
    if not callable(targets) and not isinstance(targets, (str, Sequence)):
        raise ValueError(
            f"targets must be letters, names or a function of a site; found {targets!r}"
        )
    if targets in ("mlp", "all"):
        chosen = [site for site in sites if site.role != "router"]  # only when it is named
    elif callable(targets):
        chosen = [site for site in sites if targets(site)]
    else:
        roles = isinstance(targets, str) and set(targets) <= set(_LATENT)
        names = list(targets) if roles or not isinstance(targets, str) else [targets]
        named = [{site for site in sites if _is_named(site, name)} for name in names]
        for name, fits in zip(names, named):
            if not fits and not (roles and any(named)):
                known = sorted({site.path.rpartition(".")[2] for site in sites})
                raise ValueError(
                    f"target {name!r} fits no projection; choose letters out of "
                    f"{''.join(_LATENT)!r}, 'mlp', 'all', module names ({', '.join(known)}), paths, or a "
                    "function of a site"
                )
        chosen = [site for site in sites if any(site in fits for fits in named)]
    if isinstance(layers, str):
        raise ValueError(f"layers must be integers, or None for all; found {layers!r}")
    if layers is not None:
        wanted = {layers} if isinstance(layers, int) else set(layers)
        absent = wanted - {site.layer for site in sites}
        if absent:
            raise ValueError(
                f"layers {sorted(absent)} do not exist; the model has layers "
                f"{sorted({site.layer for site in sites})}"
            )
        chosen = [site for site in chosen if site.layer in wanted]
    if not chosen:
        raise ValueError(
            f"targets={targets!r} with layers={layers!r} choose none of the {len(sites)} "
            "projections found; there is nothing to train"
        )
    return chosen


def _is_named(site: Site, name: str) -> bool:
    if site.role in _LATENT.get(name, (name,)):
        return True
    path = f"{site.path}.{site.parameter}" if site.parameter != "weight" else site.path
    return any(known == name or known.endswith(f".{name}") for known in (site.path, path))
