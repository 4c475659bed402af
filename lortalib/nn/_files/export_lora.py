"""Exact export to the LoRA files of PEFT, and import from them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..._version import __version__
from .._adapter import Adapter
from .._forward import ModuleUpdate, by_module
from .._trained_modules import Values
from .folder import write_tensors

CONFIG = "adapter_config.json"


WEIGHTS = "adapter_model.safetensors"


_PREFIX = "base_model.model."


_OUTPUT = "base_layer.out_proj"


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def lora_pairs(adapter: Adapter) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The update of every module as LoRA writes it.

    Args:
        adapter: an adapter, also one that is on no model.

    Yields:
        Name of the module, A (p, features read) and B (features written, p), both float32:
        ``B @ A`` is the whole change of its weight, as torch.nn.Linear stores one. p is the rank of
        the cut; where the parts of a fused projection read through maps of their own, the sum of
        theirs.

    Raises:
        ValueError: weights that LoRA has no pair for (packed experts, weights read directly), or
            factors without numbers.
    """
    _check(adapter)
    if any(tensor.is_meta for tensor in adapter.parameters()):
        raise ValueError(f"adapter {adapter.name!r} is on the meta device: it has no numbers")
    with torch.no_grad():
        for path, sites in by_module(adapter.sites):
            first, second = ModuleUpdate(adapter, sites).pair(torch.float32)
            yield path, first, second.mT
        for path in _attentions(adapter):  # PEFT adapts the output projection too
            width = next(site.width for site in adapter.sites if site.path == path)
            zeros = torch.zeros(1, width)
            yield f"{path}.{_OUTPUT}", zeros, zeros.mT


def _check(adapter: Adapter) -> None:
    """Refuse weights for which no LoRA file says the same to all who read it."""
    around = _attentions(adapter)
    for site in adapter.sites:
        owner, _, last = site.path.rpartition(".")
        if site.experts:
            what = "packs experts; a LoRA file has no pair for it"
        elif last == "out_proj" and owner in around:
            what = "is torch.nn.MultiheadAttention's, to which PEFT 0.21 adds a pair twice"
        elif site.weight_read_directly and site.path not in around:
            what = "is read without its module being called; a LoRA file has no pair for it"
        else:
            continue
        raise ValueError(
            f"{site.path}.{site.parameter} {what}. Merge the adapter instead (merge(), then save "
            "the model), or leave these targets out"
        )


def _attentions(adapter: Adapter) -> dict[str, None]:
    """Paths of the modules of torch.nn.MultiheadAttention whose q, k, v are adapted."""
    return dict.fromkeys(s.path for s in adapter.sites if s.parameter == "in_proj_weight")


def export_lora(
    adapter: Adapter,
    folder: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    beside: Values | None = None,
    base_model: str | None = None,
) -> Path:
    """Write an adapter as a standard LoRA of PEFT, exactly: from the cut, without an SVD.

    The file is the plainest there is, for every consumer: one rank for all modules (smaller ones are
    filled with zeros), ``lora_alpha == r`` with all scaling in the numbers, no patterns, no bias.

    Args:
        adapter: an adapter; it need not be active.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` are written.
        model: the model it belongs to, for the names in the configuration; by default the one that
            carries it.
        beside: values of modules that were trained as a whole, by path and name; by default those
            that the adapter trained beside it.
        base_model: name of the model in the configuration; the model's own by default.

    Returns:
        The folder.

    Raises:
        ValueError: a weight that LoRA has no pair for; see `lora_pairs`.
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "cp", rank=2)
        >>> sorted(path.name for path in export_lora(adapter, tempfile.mkdtemp()).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if model is None and adapter.is_on_model:
        model = adapter.model
    pairs = list(lora_pairs(adapter))
    rank = max(len(a) for _, a, _ in pairs)
    tensors = {}
    for path, a, b in pairs:
        name = f"{_PREFIX}{path}"
        tensors[f"{name}.lora_A.weight"] = _fill(a, rank).cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = _fill(b.mT, rank).mT.cpu().contiguous()
    if beside is None:
        beside = adapter.trained_modules.values(model) if adapter.trained_modules.paths else {}
    config = getattr(model, "config", None)
    for path, values in beside.items():
        tensors |= {f"{_PREFIX}{path}.{k}": v.cpu().contiguous() for k, v in values.items()}
    written: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": base_model or getattr(config, "_name_or_path", None),
        "revision": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": all(site.transposed for site in adapter.sites),
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": _targets([path.removesuffix(f".{_OUTPUT}") for path, *_ in pairs], model),
        "modules_to_save": sorted(beside) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    _write(Path(folder), written, tensors)
    return Path(folder)


def _fill(pair: Tensor, rank: int) -> Tensor:
    """Rows of zeros up to the rank."""
    return pad(pair, (0, 0, 0, rank - len(pair)))


def _task(model: nn.Module | None) -> str | None:
    """PEFT's name of what the model is for."""
    if model is None:
        return None
    name = type(model).__name__
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if both and name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def _targets(paths: Sequence[str], model: nn.Module | None) -> list[str]:
    """The last words of the paths if they name nothing else in the model, else the paths."""
    if model is not None:
        words = {path.rpartition(".")[2] for path in paths}
        named = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in words}
        if named == set(paths):
            return sorted(words)
    return sorted(set(paths))


def _write(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Both files, written aside and then put in place."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
        write_tensors(tensors, Path(aside, WEIGHTS), lortalib=__version__)
        Path(aside, CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in (WEIGHTS, CONFIG):
            os.replace(Path(aside, file), folder / file)
