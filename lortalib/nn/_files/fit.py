"""Finds the projections of a model that a saved adapter updates; if it does not fit, says what differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from .._anatomy import (
    MLP_ROLES,
    ROLES,
    BlockRule,
    Site,
    UnsupportedModelError,
    check_experts,
    is_conv1d,
    is_projection,
    linear_sites,
    mlp_sites,
    module_at,
    named_modules,
    site_weight,
    sites,
)
from .._group import Group
from .._plan import check_whole
from .._stream import stream_sites
from .._trained_modules import Values
from .folder import AdapterFileError
from .saved import SavedAdapter
from .schema import Description, values_of
from .weights import shared_weights

Rules = BlockRule | Sequence[BlockRule]


def fit_groups(model: nn.Module, saved: SavedAdapter, rules: Rules) -> list[Group]:
    """Make the groups of a saved adapter with the sites of a model, compared with the saved sites.

    Args:
        model: the model.
        saved: the saved adapter.
        rules: rows that explain a remote-code model.

    Raises:
        AdapterFileError: a projection or a trained module that the model does not have, or has in other
            sizes.
        ValueError: the model's attention was not found, or its weights cannot take an update.
    """
    description = saved.description
    _check_trained(model, saved)
    on_stream = description.config.acts_on == "stream"
    asked = _parts(description.sites()) if on_stream else list(description.sites())
    known = _candidates(model, asked, rules)
    if on_stream:
        keys = {site.key for site in asked}
        known = stream_sites(site for site in known if site.key in keys)
    found = {site.key: site for site in known}
    _check_sizes(model, description, found)
    groups = []
    for each in description.groups:
        fitted = tuple(found[site.key] for site in each.sites)
        groups.append(replace(each.group, sites=fitted))
    chosen = [site for group in groups for site in group.sites]
    check_experts(model, chosen)
    check_whole(model, {site.path: site_weight(model, site) for site in chosen})
    for path in description.trained_modules:
        _check_apart(model, path, chosen)
    return groups


def _parts(sites: Iterable[Site]) -> list[Site]:
    """Split sites on the stream by the roles that they consist of."""
    return [replace(site, role=role) for site in sites for role in site.role.split("+")]


def _candidates(model: nn.Module, asked: list[Site], rules: Rules) -> list[Site]:
    """Find the sites of the model, of the kinds that the file contains."""
    plain = [site for site in asked if site.role not in ROLES or _is_linear(site.stack)]
    roles = {site.role for site in asked if site.role in ROLES and not _is_linear(site.stack)}
    modules = {path: m for path, m in named_modules(model).items() if is_projection(m)}
    chosen = {site.path: modules[site.path] for site in plain if site.path in modules}
    found = linear_sites(chosen, {path: widths(module) for path, module in chosen.items()})
    lost = {site.key for site in plain} - {site.key for site in found}
    # A stack of attention can have a name that begins as those of linear maps do.
    roles |= {role for _, _, role in lost} & set(ROLES)
    try:
        if roles & set(ROLES) - set(MLP_ROLES):
            found += sites(model, rules=rules)
        if roles & set(MLP_ROLES):
            found += mlp_sites(model)
    except UnsupportedModelError:
        if len(plain) < len(asked):
            raise
    return found


def _is_linear(stack: str) -> bool:
    return stack == "linear" or stack.startswith("linear.")


def widths(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of features that a linear map reads and writes.

    Example:
        >>> widths(nn.Linear(3, 4))
        (3, 4)
    """
    if is_conv1d(module):
        read, written = module.get_parameter("weight").shape
        return read, written
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def _check_sizes(
    model: nn.Module, description: Description, found: Mapping[tuple[str, int, str], Site]
) -> None:
    differences = []
    for site in description.sites():
        other = found.get(site.key)
        where = f"{site.stack} layer {site.layer} {site.role}"
        if other is None:
            differences.append(f"{where}: the model has no such projection")
        elif _sizes(other) != _sizes(site):
            differences.append(
                f"{where}: heads, query heads, head_dim, width are {_sizes(site)} in the file, "
                f"{_sizes(other)} in the model"
            )
        elif (other.experts, other.writer) != (site.experts, site.writer):
            differences.append(
                f"{where}: experts and whether it writes the residual stream are "
                f"{(site.experts, site.writer)} in the file, {(other.experts, other.writer)} in the "
                "model"
            )
    if differences:
        base = description.base_model
        trained_on = " ".join(filter(None, [base.get("class"), base.get("name")]))
        shown = "\n  ".join(differences[:5])
        more = f"\n  ... and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise AdapterFileError(
            f"the adapter (trained on {trained_on}) does not fit {type(model).__name__}; nothing was "
            f"changed:\n  {shown}{more}"
        )


def _sizes(site: Site) -> tuple[int, ...]:
    return site.heads, site.query_heads, site.head_dim, site.width


def _check_trained(model: nn.Module, saved: SavedAdapter) -> None:
    """Check that the model has the modules that were trained as a whole."""
    description, file = saved.description, saved.file
    modules = named_modules(model)
    for path, names in values_of(description, saved.names).items():
        if path not in modules:
            raise AdapterFileError(
                f"the adapter in {file.path} was trained beside the module {path!r}, which "
                f"{type(model).__name__} does not have"
            )
        found = {own: file.specs[saved.names[key]].shape for own, key in names.items()}
        wanted = {own: tuple(t.shape) for own, t in modules[path].state_dict().items()}
        if found != wanted:
            raise AdapterFileError(
                f"the module {path!r} saved with the adapter holds {found}; the model's holds {wanted}"
            )
    known = description.shared_weights
    here = shared_weights(model, description.trained_modules)
    for path in description.trained_modules if known is not None else ():
        before = (known or {}).get(path, ())
        if bool(before) != bool(here[path]):
            raise AdapterFileError(
                f"the weights of the module {path!r} were shared with {_listed(before)} when the "
                f"adapter was trained; in this {type(model).__name__} they are shared with "
                f"{_listed(here[path])}, so its values would mean something else. Load it on a model "
                "with the same tie_word_embeddings"
            )


def check_values(model: nn.Module, values: Values) -> None:
    """Refuse values of trained modules that are too large for the dtype in which the model holds them.

    Args:
        model: the model.
        values: by path of the module and name in it, with the names and shapes of the model's.

    Raises:
        AdapterFileError: a value would become infinite.
    """
    for path, tensors in values.items():
        own = module_at(model, path).state_dict()
        for name, tensor in tensors.items():
            here = own[name].dtype
            if not (tensor.is_floating_point() and here.is_floating_point and tensor.numel()):
                continue
            largest = tensor.abs().max().item()
            if largest > torch.finfo(here).max:
                raise AdapterFileError(
                    f"{path}.{name}, trained with the adapter, holds {largest:g}, which is beyond {here}, in "
                    f"which {type(model).__name__} holds it; load it on a model of dtype {tensor.dtype}"
                )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


def _check_apart(model: nn.Module, path: str, chosen: Iterable[Site]) -> None:
    """Refuse a trained module without parameters, or with a weight that an adapter updates."""
    if not any(True for _ in model.get_submodule(path).parameters()):
        raise AdapterFileError(
            f"the module {path!r}, trained with the adapter, has no parameters here"
        )
    for site in chosen:
        for inner in (site.path, *site.tied_paths):
            if inner == path or inner.startswith(f"{path}."):
                raise AdapterFileError(
                    f"the module {path!r}, trained with the adapter, holds the adapted projection "
                    f"{inner!r} in {type(model).__name__}"
                )
