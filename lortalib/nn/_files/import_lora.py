"""An existing LoRA as a network of legs: everything that works on an adapter then works on it."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...decomp import Network, get_format
from .._adapter import Adapter, AdapterConfig
from .._anatomy import BlockRule, Site, UnsupportedModelError, linear_sites, mlp_sites, sites
from .._group import Group, group_sites
from .._host import check_name, install
from .._trained_modules import TrainedModules, Values, find_modules
from .export_lora import CONFIG, WEIGHTS
from .folder import AdapterFileError

_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$"
)


_REFUSED = {
    "use_dora": "DoRA rescales whole weights",
    "lora_bias": "it trains biases",
    "target_parameters": "it adapts packed parameters",
    "layer_replication": "it copies layers of the base",
}


class LowRank(NamedTuple):
    """The pair of one module, ``dW = b @ a``.

    Attributes:
        a: (r, features read).
        b: (features written, r), with the scaling in it.
    """

    a: Tensor
    b: Tensor


def load_lora(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    name: str = "default",
    active: bool = True,
    freeze: bool = True,
    rules: BlockRule | Sequence[BlockRule] = (),
) -> Adapter:
    """Put an existing LoRA of PEFT on a model, exactly, as an adapter of the format ``lora``.

    Its numbers become the parameters ``layer matrix in r`` and ``layer matrix head out r`` of one
    network for each size of projections, so it can be trained on, merged, decomposed, exported and
    saved as any other adapter. Scaling, rank and alpha patterns are in the numbers.

    Args:
        model: the model that the LoRA was trained on.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: name of the adapter on the model.
        active: whether it takes part in the forward at once.
        freeze: whether all else of the model stops requiring gradients.
        rules: rows that explain a remote-code model, as for `lortalib.nn.sites`.

    Returns:
        The `Adapter`.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterFileError: a damaged file, one of another method, a variant that is no sum of low-rank
            pairs (DoRA, biases, embeddings, convolutions), or modules that the model does not have.
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
    check_name(model, name)
    config, pairs, rest = _read(Path(folder))
    modules = dict(model.named_modules())
    _check_fit(modules, pairs)
    beside = _beside(model, config.get("modules_to_save") or [], rest)
    groups = group_sites(_sites(model, modules, pairs, rules), gqa="split")
    networks = {group.name: _network(group, pairs, modules) for group in groups}
    settings = AdapterConfig(
        "lora", 1.0, 1.0, float(config.get("lora_dropout") or 0), "split", "lora"
    )
    adapter = Adapter(name, settings, tuple(groups), networks, beside)
    install(adapter, model, active=active, freeze=freeze)
    return adapter


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, LowRank], dict[str, Tensor]]:
    """The configuration, the pairs by path of their module, and the other tensors."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"no {file} in {folder}; a LoRA of PEFT is a folder with {CONFIG} and {WEIGHTS}"
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterFileError(f"a file in {folder} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise AdapterFileError(f"{folder / CONFIG} describes no LoRA but {kind!r}")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise AdapterFileError(f"the LoRA in {folder} has {key}: {why}, which no pair can say")
    if config.get("bias", "none") != "none":
        raise AdapterFileError(f"the LoRA in {folder} trains biases (bias={config['bias']!r})")
    sides: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        found = _KEY.match(key)
        if found and tensor.dim() == 2:
            if not torch.isfinite(tensor).all():
                raise AdapterFileError(f"tensor {key!r} in {folder} holds NaN or infinity")
            sides.setdefault(found["path"], {})[found["side"]] = tensor.float()
        elif ".lora_" in key:
            raise AdapterFileError(
                f"tensor {key!r} in {folder} is no side of a linear map's pair (shape "
                f"{tuple(tensor.shape)}); embeddings, convolutions and DoRA cannot be read"
            )
        else:
            rest[key.removeprefix("base_model.model.")] = tensor
    pairs = {}
    for path, side in sides.items():
        if set(side) != {"A", "B"} or side["A"].shape[0] != side["B"].shape[1]:
            raise AdapterFileError(f"the pair of {path} in {folder} is not whole")
        pairs[path] = LowRank(side["A"], side["B"] * _scaling(config, path, len(side["A"])))
    if not pairs:
        raise AdapterFileError(f"{folder / WEIGHTS} holds no pair of a LoRA")
    return config, pairs, rest


def _scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    """alpha/r of one module, patterns and rsLoRA heeded; the tensor says what r is."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_fit(modules: Mapping[str, nn.Module], pairs: Mapping[str, LowRank]) -> None:
    for path, (a, b) in pairs.items():
        module = modules.get(path)
        if module is None:
            raise AdapterFileError(
                f"the LoRA adapts {path}, which the model does not have; is it the model it was "
                "trained on, with the same head?"
            )
        weight = getattr(module, "weight", None)
        if not isinstance(module, (nn.Linear, Conv1D)) or not isinstance(weight, Tensor):
            raise AdapterFileError(f"the LoRA adapts {path}, a {type(module).__name__}")
        wanted = tuple(weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape)
        if wanted != (b.shape[0], a.shape[1]):
            raise AdapterFileError(
                f"the LoRA's pair for {path} is of a {b.shape[0]} x {a.shape[1]} matrix; the model's "
                f"is {wanted[0]} x {wanted[1]}"
            )


def _sites(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    pairs: Mapping[str, LowRank],
    rules: BlockRule | Sequence[BlockRule],
) -> list[Site]:
    """The sites of the adapted modules."""
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
        # Parts of a fused projection that leave features out would lose those of the pair.
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
    """The network of a group, with zeros where a layer lacks a matrix or a pair is of lower rank."""
    rank = max(len(pairs[site.path].a) for site in group.sites)
    legs = get_format("lora").legs(group.shape)
    sizes = {**group.shape, "r": rank}
    tensors = [torch.zeros([sizes[leg] for leg in term.legs]) for term in legs.terms]
    for site in group.sites:
        a, b = pairs[site.path]
        if site.rows is not None:
            b = b[site.rows.index()]
        if site.writer:  # the tensor holds the update with the residual stream as its `in`
            a, b = b.mT, a.mT
        at = group.layers.index(site.layer), group.roles.index(site.role)
        tensors[0][at][:, : len(a)] = a.mT
        tensors[1][at][..., : len(a)] = b.reshape(group.heads, site.head_dim, len(a))
    network = Network(legs, tensors, group.shape)
    weight: Any = modules[group.sites[0].path].weight
    return network.to(weight.device)


def _beside(model: nn.Module, names: Sequence[str], rest: dict[str, Tensor]) -> TrainedModules:
    """The modules that were trained as a whole."""
    values: Values = {}
    for path, module in model.named_modules():
        if any(path == name or path.endswith(f".{name}") for name in names):
            expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
            found = {k: rest.pop(f"{path}.{k}") for k in expected if f"{path}.{k}" in rest}
            if {k: tuple(v.shape) for k, v in found.items()} != expected:
                raise AdapterFileError(
                    f"the LoRA's values of the module {path} do not fit the model"
                )
            values[path] = found
    own = model.state_dict()
    for key in list(rest):  # PEFT stores embeddings beside a LoRA on them; the model has those
        known = own.get(key.replace(".base_layer.", "."))
        if known is not None and torch.equal(known.cpu(), rest[key].to(known.dtype)):
            del rest[key]
    if rest:
        raise AdapterFileError(
            "the LoRA holds tensors that are no pair, no module to save and not the model's own: "
            f"{', '.join(sorted(rest)[:4])}"
        )
    find_modules(model, list(values), ())
    return TrainedModules(tuple(values), values)
