"""Finds the MLPs of a model: gates and up-projections read the residual stream, down-projections write it.

Packed experts are one site with a mode ``expert``. Their router is a site too, but it is adapted only if
the user names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from .site import WRITERS, FeatureRows, Site, feature_rows
from .weights import is_conv1d, is_projection, widths


class _Names(NamedTuple):
    """The names of the projections of one kind of MLP; ``fused`` holds gate and up, in this order."""

    up: str = ""
    down: str = ""
    gate: str = ""
    fused: str = ""


_KINDS = (
    _Names(gate="gate_proj", up="up_proj", down="down_proj"),
    _Names(gate="fc1_g", up="fc1_x", down="fc2"),  # timm
    _Names(gate="w1", up="w3", down="w2"),
    _Names(gate="wi_0", up="wi_1", down="wo"),
    _Names(fused="gate_up_proj", down="down_proj"),
    _Names(fused="gate_up_proj", down="fc2"),
    _Names(fused="Wi", down="Wo"),
    *(
        _Names(up=up, down=down)
        for up, down in (
            ("up_proj", "down_proj"),
            ("fc1", "fc2"),
            ("lin1", "lin2"),
            ("linear1", "linear2"),
            ("linear_1", "linear_2"),
            ("linear_fc1", "linear_fc2"),
            ("fc_in", "fc_out"),
            ("c_fc", "c_proj"),
            ("dense1", "dense2"),
            ("dense_h_to_4h", "dense_4h_to_h"),
            ("intermediate_dense", "output_dense"),
            ("proj_in", "proj_out"),
            ("up", "down"),
            ("wi", "wo"),
            ("intermediate.dense", "output.dense"),
            ("intermediate_query.dense", "output_query.dense"),
            ("intermediate", "output"),
        )
    ),
)


def read_mlps(modules: dict[str, nn.Module]) -> dict[str, list[Site]]:
    """Make the sites of every MLP, by the path of the module that holds it; stack and layer are set later."""
    found: dict[str, list[Site]] = {}
    for path, module in modules.items():
        experts = _experts(path, module)
        if experts:
            found[path] = experts
            router = _router(path.rpartition(".")[0], modules)
            if router is not None:
                found[router.path] = [router]
            continue
        for names in _KINDS:
            sites = list(_plain(path, modules, names))
            if sites:
                found[path] = sites
                break
    return found


def _plain(path: str, modules: dict[str, nn.Module], names: _Names) -> Iterator[Site]:
    """Make the sites of an MLP with these names, if the module holds one and its widths agree."""
    held = {
        role: f"{path}.{name}" if path else name for role, name in names._asdict().items() if name
    }
    if not all(leaf in modules and is_projection(modules[leaf]) for leaf in held.values()):
        return
    width = {role: widths(modules[leaf]) for role, leaf in held.items()}
    inner, residual = width["down"]
    readers = {
        role: 2 if role == "fused" else 1 for role in ("gate", "up", "fused") if role in held
    }
    if any(width[role] != (residual, parts * inner) for role, parts in readers.items()):
        return
    for role in held:
        for k, name in enumerate(("gate", "up") if role == "fused" else (role,)):
            rows = feature_rows(k * inner, (inner, 1)) if role == "fused" else None
            module = modules[held[role]]
            yield _site(
                name,
                held[role],
                inner,
                residual,
                rows,
                2 * inner if rows else None,
                transposed=is_conv1d(module),
            )


def _experts(path: str, module: nn.Module) -> list[Site]:
    """Make the sites of experts packed as 3-D parameters, which transformers marks with
    ``use_experts_implementation``."""
    flags = ("is_transposed", "is_concatenated", "has_gate")
    if not all(isinstance(getattr(module, flag, None), bool) for flag in flags):
        return []
    parameters = dict(module.named_parameters(recurse=False))
    transposed, concatenated = bool(module.is_transposed), bool(module.is_concatenated)
    reader = "gate_up_proj" if module.has_gate else "up_proj"
    if any(name not in parameters or parameters[name].dim() != 3 for name in (reader, "down_proj")):
        return []
    count, first, second = parameters["down_proj"].shape
    inner, residual = (first, second) if transposed else (second, first)
    sites = []
    for k, role in enumerate(("gate", "up") if module.has_gate else ("up",)):
        rows, fused = None, None
        if module.has_gate:
            rows = (
                feature_rows(k * inner, (inner, 1)) if concatenated else feature_rows(k, (inner, 2))
            )
            fused = 2 * inner
        sites.append(_site(role, path, inner, residual, rows, fused, transposed, reader, count))
    return [
        *sites,
        _site("down", path, inner, residual, None, None, transposed, "down_proj", count),
    ]


def _router(block: str, modules: dict[str, nn.Module]) -> Site | None:
    """Make the site of the router of packed experts: a linear map, or a module that reads its own weight."""
    for name in ("router", "gate"):
        path = f"{block}.{name}" if block else name
        weight = getattr(modules.get(path), "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 2:
            site = _site("router", path, weight.shape[0], weight.shape[1], None, None)
            return replace(site, weight_read_directly=not is_projection(modules[path]))
    return None


def _site(
    role: str,
    path: str,
    inner: int,
    residual: int,
    rows: FeatureRows | None,
    fused: int | None,
    transposed: bool = False,
    parameter: str = "weight",
    experts: int = 0,
) -> Site:
    return Site(
        stack="",
        layer=0,
        role=role,
        path=path,
        heads=1,
        query_heads=1,
        head_dim=int(inner),
        width=int(residual),
        writer=role in WRITERS,
        transposed=transposed,
        parameter=parameter,
        rows=rows,
        fused=fused,
        weight_read_directly=experts > 0,
        experts=int(experts),
    )


#: Expert implementations of transformers that read the packed parameters, so that an adapter acts.
SUPPORTED_EXPERTS = ("eager", "batched_mm", "grouped_mm")


def check_experts(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse implementations of experts that would not use an adapter's update.

    Raises:
        ValueError: the module of a site uses such an implementation.
    """
    for site in sites:
        config = getattr(model.get_submodule(site.path), "config", None)
        used = getattr(config, "_experts_implementation", None)
        if site.experts and used is not None and used not in SUPPORTED_EXPERTS:
            raise ValueError(
                f"{site.path} uses the experts implementation {used!r}, which does not read the "
                f"weights an adapter changes; load the model with experts_implementation= one of "
                f"{', '.join(map(repr, SUPPORTED_EXPERTS))}"
            )
