"""Chooses the projections of a model that an adapter updates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Union

from torch import nn

from ._anatomy import BlockRule, Site, UnsupportedModelError, mlp_sites, sites

#: The roles that each letter of targets means; q, k and v may first project to a latent ("q_a", "kv_a").
_LATENT = {"q": ("q", "q_a"), "k": ("k", "kv_a"), "v": ("v", "kv_a"), "o": ("o",)}

#: Targets that mean attention and MLP together; PEFT's name for them is the second.
_EVERYTHING = ("all", "all-linear")

#: Letters out of ``"qkvo"``, ``"mlp"``, ``"all"``, one text (a module name, a path, or a regular expression
#: that a whole path matches), a list of names, paths or roles, or a predicate on a `Site`.
Targets = Union[str, Sequence[str], Callable[[Site], bool]]


def find_candidates(
    model: nn.Module, targets: Targets, rules: BlockRule | Sequence[BlockRule]
) -> list[Site]:
    """Find the sites that targets of this kind choose from."""
    if targets == "mlp":
        return mlp_sites(model)
    attention = sites(model, rules=rules)
    if targets in _EVERYTHING:
        return attention + mlp_sites(model)
    if callable(targets) or are_letters(targets):
        return attention
    try:
        return attention + mlp_sites(model)
    except UnsupportedModelError:
        return attention


def are_letters(targets: object) -> bool:
    """Return True for targets that are letters out of ``"qkvo"``."""
    return isinstance(targets, str) and set(targets) <= set(_LATENT)


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
    if targets in ("mlp", *_EVERYTHING):
        chosen = [site for site in sites if site.role != "router"]  # a router must be named
    elif callable(targets):
        chosen = [site for site in sites if targets(site)]
    else:
        roles, one = are_letters(targets), isinstance(targets, str)
        names = [targets] if isinstance(targets, str) and not roles else list(targets)
        named = [{site for site in sites if _is_named(site, name)} for name in names]
        if one and not roles and not named[0]:
            named = [{site for site in sites if _matches(site, names[0])}]
        for name, fits in zip(names, named):
            if not fits and not (roles and any(named)):
                known = sorted({site.path.rpartition(".")[2] for site in sites})
                raise ValueError(
                    f"target {name!r} fits no projection; choose letters out of "
                    f"{''.join(_LATENT)!r}, 'mlp', 'all', module names ({', '.join(known)}), paths, one "
                    "regular expression that whole paths match, or a function of a site"
                )
        chosen = [site for site in sites if any(site in fits for fits in named)]
    if isinstance(layers, str) or not (layers is None or isinstance(layers, (int, Iterable))):
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


def _matches(site: Site, pattern: str) -> bool:
    """Return True if a regular expression matches the whole path of a site."""
    try:
        return any(re.fullmatch(pattern, path) for path in (site.path, *site.tied_paths))
    except re.error:
        return False


def _is_named(site: Site, name: str) -> bool:
    if site.role in _LATENT.get(name, (name,)):
        return True
    path = f"{site.path}.{site.parameter}" if site.parameter != "weight" else site.path
    return any(known == name or known.endswith(f".{name}") for known in (site.path, path))
