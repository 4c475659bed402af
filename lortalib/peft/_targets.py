"""Finds the sites of PEFT's target modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn

from ..nn import Site, UnsupportedModelError, mlp_sites
from ..nn.door import (
    MLP_ROLES,
    are_letters,
    choose_sites,
    linear_sites,
    understood_sites,
)


def known_sites(model: nn.Module) -> list[Site]:
    """Find the projections of a model whose role lortalib knows; the list can be empty."""
    found: list[Site] = [*understood_sites(model)]
    with suppress(UnsupportedModelError):  # a model without an MLP
        found += mlp_sites(model)
    return [site for site in found if not site.experts]


def sites_of(known: Sequence[Site], modules: Mapping[str, nn.Module]) -> list[Site]:
    """Find the sites of these modules: the known sites, and one matrix with one head for any other module."""
    own = [site for site in known if {site.path, *site.tied_paths} & set(modules)]
    named = {path for site in own for path in (site.path, *site.tied_paths)}
    others = {path: module for path, module in modules.items() if path not in named}
    sizes: dict[str, Any] = {p: _get_in_out_features(module) for p, module in others.items()}
    return own + linear_sites(others, sizes)


def short_names(model: nn.Module, paths: set[str]) -> set[str]:
    """Shorten paths to their last words, if these words name no other modules.

    Args:
        model: the model, with or without PEFT's layers in it.
        paths: paths of modules in the model.
    """
    words = {path.rpartition(".")[2] for path in paths}
    named = {
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if name.removesuffix(".base_layer").rpartition(".")[2] in words
    }
    return words if named == paths else paths


def named_targets(model: nn.Module, known: Sequence[Site], targets: Any) -> Any:
    """Convert None, letters out of ``"qkvo"``, ``"mlp"``, ``"all"``, and roles in a list to names of modules;
    other targets are returned unchanged, because PEFT understands them.

    Args:
        model: the model, with or without PEFT's layers in it.
        known: the projections whose role is known.
        targets: the targets of the configuration.

    Raises:
        ValueError: no known projection fits None, or the letters.
    """
    own = [site for site in known if not site.weight_read_directly]
    if targets is None:
        own = [site for site in own if site.role not in MLP_ROLES]
        if not own:
            raise ValueError("Please specify `target_modules` in `peft_config`")
        return short_names(model, _paths(own))
    if isinstance(targets, str):
        if targets not in ("mlp", "all") and not are_letters(targets):
            return targets
        mlp = [site for site in own if site.role in MLP_ROLES]
        attention = [site for site in own if site not in mlp]
        chosen = {"mlp": mlp, "all": own}.get(targets, attention)
        if not chosen:
            raise ValueError(
                f"target_modules={targets!r} fits no projection whose role is known here"
            )
        return short_names(model, _paths(choose_sites(chosen, targets, None)))
    words = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    roles = {name for name in targets if name not in words} & {site.role for site in own}
    if not roles:
        return targets
    paths = _paths(site for site in own if site.role in roles)
    return {*targets} - roles | short_names(model, paths)


def _paths(sites: Iterable[Site]) -> set[str]:
    return {path for site in sites for path in (site.path, *site.tied_paths)}
