"""Turns an existing LoRA into an adapter, so that everything that works on adapters works on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn

from ...decomp import Network, get_format
from .._adapter import Adapter
from .._adapters import check_name, install
from .._anatomy import (
    Site,
    UnsupportedModelError,
    is_conv1d,
    linear_sites,
    mlp_sites,
    named_modules,
    site_weight,
    sites,
)
from .._config import AdapterConfig
from .._group import Group, group_sites
from .._hub import local_folder
from .._plan import check_whole
from .fit import Rules, widths
from .folder import AdapterFileError
from .lora_config import CONFIG, WEIGHTS, saved_modules
from .lora_file import LowRank, open_lora
from .lora_modules import check_modules, take_modules


def load_lora(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    name: str = "default",
    active: bool = True,
    freeze: bool = True,
    rules: Rules = (),
    revision: str | None = None,
    token: str | bool | None = None,
) -> Adapter:
    """Put an existing LoRA of PEFT on a model, exactly, as an adapter of the format ``lora``.

    Its matrices become the parameters ``layer matrix in r`` and ``layer matrix head out r`` of one
    network for each size of projection. It can then be trained, merged, decomposed, exported and saved
    like any other adapter. Scaling, rank patterns and alpha patterns are multiplied in.

    Args:
        model: the model that the LoRA was trained on.
        folder: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a repository of
            the Hugging Face hub, ``user/name``. A local path goes before the hub.
        name: the adapter's name on the model.
        active: whether the adapter takes part in the forward at once.
        freeze: whether all other parameters of the model stop requiring gradients.
        rules: rows that explain a remote-code model, as for `lortalib.nn.sites`.
        revision: a branch, tag or commit of the repository; by default ``main``.
        token: a token of the hub; by default the one that ``hf auth login`` stored.

    Returns:
        The `Adapter`.

    Raises:
        FileNotFoundError: a file is missing, or the hub has no such repository or revision.
        ConnectionError: the hub cannot be reached, and the repository was not downloaded before.
        AdapterFileError: a damaged file, another method, a variant that is more than low-rank pairs
            (DoRA, biases, embeddings, convolutions), modules that the model does not have, or values for
            one of several modules that share one weight. The model stays unchanged.
        ValueError: the name is in use.

    Example:
        >>> import tempfile, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> folder = lortalib.nn.apply(model, "cp", rank=2).export_lora(tempfile.mkdtemp())
        >>> str(load_lora(model, folder, name="again").networks["encoder"].legs)
        'layer matrix in r, layer matrix head out r'
    """
    model = check_name(model, name)
    modules = named_modules(model)
    with open_lora(local_folder(folder, (CONFIG, WEIGHTS), revision, token)) as file:
        _check_fit(modules, file.shapes)
        paths = check_modules(model, saved_modules(file.config), file.shapes, file.others)
        pairs, others = file.read()
    trained = take_modules(model, paths, others)
    chosen = _sites(model, modules, pairs, rules)
    check_whole(model, {site.path: site_weight(model, site) for site in chosen})
    groups = group_sites(chosen, gqa="split")
    networks = {group.name: _network(group, pairs, modules) for group in groups}
    dropout = float(file.config.get("lora_dropout") or 0)
    config = AdapterConfig("lora", 1.0, 1.0, dropout, "split", "lora")
    adapter = Adapter(name, config, tuple(groups), networks, trained)
    install(adapter, model, active=active, freeze=freeze)
    return adapter


def _check_fit(modules: Mapping[str, nn.Module], shapes: Mapping[str, tuple[int, int]]) -> None:
    for path, shape in shapes.items():
        module = modules.get(path)
        if module is None:
            raise AdapterFileError(
                f"the LoRA adapts {path}, which the model does not have; is it the model it was "
                "trained on, with the same head?"
            )
        if not (isinstance(module, nn.Linear) or is_conv1d(module)):
            raise AdapterFileError(f"the LoRA adapts {path}, a {type(module).__name__}")
        read, written = widths(module)
        if shape != (written, read):
            raise AdapterFileError(
                f"the LoRA's pair for {path} is of a {shape[0]} x {shape[1]} matrix; the model's is "
                f"{written} x {read}"
            )


def _sites(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    pairs: Mapping[str, LowRank],
    rules: Rules,
) -> list[Site]:
    """Make the sites of the adapted modules."""
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
    for path in pairs:
        found = parts[path]
        # Sites that do not cover a fused projection would lose the pair's update of the other features.
        if found and sum(site.features for site in found) == (found[0].fused or found[0].features):
            own += found
        else:
            others[path] = modules[path]
    own.sort(key=known.index)
    sizes = {path: (pairs[path].a.shape[1], pairs[path].b.shape[0]) for path in others}
    return own + linear_sites(others, sizes)


def _network(
    group: Group, pairs: Mapping[str, LowRank], modules: Mapping[str, nn.Module]
) -> Network:
    """Make the network of a group; a missing matrix, or the missing ranks of a pair, are zeros."""
    rank = max(len(pairs[site.path].a) for site in group.sites)
    legs = get_format("lora").legs(group.shape)
    sizes = {**group.shape, "r": rank}
    tensors = [torch.zeros([sizes[leg] for leg in term.legs]) for term in legs.terms]
    for site in group.sites:
        a, b = pairs[site.path]
        if site.rows is not None:
            b = b[site.rows.index()]
        if site.writer:  # in the tensor, `in` of the update is the residual stream
            a, b = b.mT, a.mT
        at = group.layers.index(site.layer), group.roles.index(site.role)
        tensors[0][at][:, : len(a)] = a.mT
        tensors[1][at][..., : len(a)] = b.reshape(group.heads, site.head_dim, len(a))
    network = Network(legs, tensors, group.shape)
    weight: Any = modules[group.sites[0].path].weight
    return network if weight.is_meta else network.to(weight.device)
