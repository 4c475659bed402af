"""Fits the pairs of a LoRA to a model: the sites of its modules, and the network that holds the pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ...decomp import Network, Shape, get_format
from .._anatomy import (
    Site,
    UnsupportedModelError,
    is_conv1d,
    linear_sites,
    mlp_sites,
    named_modules,
    sites,
)
from .._group import Group
from .fit import Rules, widths
from .folder import AdapterFileError
from .lora_file import LowRank

#: The pairs of one LoRA by the path of their module.
Pairs = Mapping[str, LowRank]


def check_fit(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse pairs that do not fit the modules of a model.

    Args:
        model: the model.
        shapes: (features written, features read) of each pair, by the path of its module.

    Raises:
        AdapterFileError: a module that the model does not have, that is no linear map, or of other sizes.
    """
    modules = named_modules(model)
    for path, shape in shapes.items():
        module = modules.get(path)
        if module is None:
            raise AdapterFileError(_why_absent(model, path, modules))
        if not (isinstance(module, nn.Linear) or is_conv1d(module)):
            raise AdapterFileError(f"the LoRA adapts {path}, a {type(module).__name__}")
        read, written = widths(module)
        if shape != (written, read):
            raise AdapterFileError(
                f"the LoRA's pair for {path} is of a {shape[0]} x {shape[1]} matrix; the model's is "
                f"{written} x {read}"
            )


def _why_absent(model: nn.Module, path: str, paths: Iterable[str]) -> str:
    """Say that a model lacks a path, and which one it has instead if only the model around it differs."""
    name = type(model).__name__
    near = next((p for p in paths if "." in p and path.endswith(f".{p}")), None)
    near = near or next((p for p in paths if p.endswith(f".{path}")), None)
    lacks = f"the LoRA adapts {path}, which the model does not have, a {name}"
    if near is None:
        return f"{lacks}; give the model it was trained on, with the same head"
    return (
        f"{lacks}: there it is {near}, so the head differs. Give a model of the class that the LoRA was "
        "trained on. A configuration stands for the class that its architectures name, and without them for "
        "a model without a head: set config.architectures, for instance to "
        f"['{name.removesuffix('Model')}ForSequenceClassification']"
    )


def lora_sites(
    model: nn.Module, shapes: Mapping[str, tuple[int, int]], rules: Rules = ()
) -> list[Site]:
    """Make the sites of the modules that have a pair, attention and MLPs first.

    Args:
        model: the model.
        shapes: (features written, features read) of each pair, by the path of its module.
        rules: rows that explain a remote-code model.
    """
    modules = named_modules(model)
    known: list[Site] = []
    for find in (lambda: sites(model, rules=rules), lambda: mlp_sites(model)):
        try:
            known += find()
        except UnsupportedModelError:
            continue
    parts: dict[str, list[Site]] = defaultdict(list)
    for site in known:
        if not (site.experts or site.weight_read_directly or site.tied_paths):
            parts[site.path].append(site)
    own, others = [], {}
    for path in shapes:
        found = parts[path]
        # Sites that do not cover a fused projection would lose the pair's update of the other features.
        if found and sum(site.features for site in found) == (found[0].fused or found[0].features):
            own += found
        else:
            others[path] = modules[path]
    own.sort(key=known.index)
    return own + linear_sites(others, {path: shapes[path][::-1] for path in others})


def lora_network(group: Group, several: Sequence[Pairs], mode: str = "") -> Network:
    """Make the network of the format ``lora`` that holds the pairs of a group, exactly.

    A site without a pair, and the missing ranks of a pair, are zeros. The query heads of a group have the
    update of the key/value head that they use.

    Args:
        group: the group.
        several: the pairs of each LoRA.
        mode: the name of the first mode, which numbers the LoRAs; without it there is one.

    Returns:
        A network over ``mode`` and the modes of the group, in float32.
    """
    ranks = [len(pairs[s.path].a) for pairs in several for s in group.sites if s.path in pairs]
    first = {mode: len(several)} if mode else {}
    lead = f"{mode} " if mode else ""
    line = f"{lead}layer matrix in r, {lead}layer matrix head out r"
    legs = get_format(line).legs(group.shape)
    sizes = {**first, **group.shape, "r": max(ranks, default=1)}
    tensors = [torch.zeros([sizes[leg] for leg in term.legs]) for term in legs.terms]
    for number, pairs in enumerate(several):
        for site in group.sites:
            if site.path not in pairs:
                continue
            a, b = residual_pair(site, pairs[site.path])
            place = group.layers.index(site.layer), group.roles.index(site.role)
            at = (number, *place) if mode else place
            heads = b.reshape(site.heads, site.head_dim, len(a))
            tensors[0][at][:, : len(a)] = a.mT
            tensors[1][at][..., : len(a)] = heads.repeat_interleave(group.heads // site.heads, 0)
    return Network(legs, tensors, Shape({**first, **group.shape}))


def residual_pair(site: Site, pair: LowRank) -> LowRank:
    """Take one site's part out of the pair of its module.

    Returns:
        A (r, width) on the side of the residual stream, and B (heads * head_dim, r) on the other.
    """
    a, b = pair
    if site.rows is not None:
        b = b[site.rows.index()]
    return LowRank(b.mT, a.mT) if site.writer else LowRank(a, b)
