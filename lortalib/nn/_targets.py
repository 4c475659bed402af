"""Chooses the projections of a model that an adapter updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Union

from torch import nn

from ._anatomy import BlockRule, Site, UnsupportedModelError, mlp_sites, sites

#: The roles that each letter of targets means; q, k and v may first project to a latent ("q_a", "kv_a").
_LATENT = {"q": ("q", "q_a"), "k": ("k", "kv_a"), "v": ("v", "kv_a"), "o": ("o",)}

#: Letters out of ``"qkvo"``, ``"mlp"``, ``"all"``, module names or paths, or a predicate on a `Site`.
Targets = Union[str, Sequence[str], Callable[[Site], bool]]


def find_candidates(
    model: nn.Module, targets: Targets, rules: BlockRule | Sequence[BlockRule]
) -> list[Site]:
    """Find the sites that targets of this kind choose from."""
    if targets == "mlp":
        return mlp_sites(model)
    attention = sites(model, rules=rules)
    if targets == "all":
        return attention + mlp_sites(model)
    if isinstance(targets, str) or callable(targets):
        return attention
    try:
        return attention + mlp_sites(model)
    except UnsupportedModelError:
        return attention


def choose_sites(
    sites: Sequence[Site], targets: Targets, layers: int | Iterable[int] | None
) -> list[Site]:
    """Choose the sites that ``targets`` and ``layers`` name.

    Raises:
        ValueError: no site is chosen, or a name or layer fits no site.
    """
    if not callable(targets) and not isinstance(targets, (str, Sequence)):
        raise ValueError(
            f"targets must be letters, names or a function of a site; found {targets!r}"
        )
    if targets in ("mlp", "all"):
        chosen = [site for site in sites if site.role != "router"]  # a router must be named
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
