"""Writes an adapter of any format exactly, as the files of a LoRA of PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from ..._kinds import MODULE, PATH, TEXT, Kind, takes
from ..._stacklevel import outside
from ..._version import __version__
from .._adapter import ADAPTER, Adapter
from .._anatomy import named_modules
from .._base_record import warn_of_changes
from .._sharded import divide_again
from .._trained_modules import Values
from .adapter import check_numbers
from .folder import is_of_peft, put_files, write_text
from .lora_config import CONFIG, WEIGHTS
from .lora_file import sealed_metadata
from .lora_pairs import OUTPUT, lora_pairs
from .tensors import plain, write_tensors
from .weights import SavedModules, SharedWeights, shared_weights

_PREFIX = "base_model.model."
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
#: The names of the modules that PEFT trains besides a LoRA for a task, and looks for in its file.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


_VALUES = Kind(
    "a mapping from paths to mappings from names to tensors",
    lambda value: (
        isinstance(value, Mapping)
        and all(
            isinstance(own, Mapping) and all(isinstance(each, Tensor) for each in own.values())
            for own in value.values()
        )
    ),
)


@takes(
    adapter=ADAPTER,
    folder=PATH,
    model=MODULE.or_none,
    trained_modules=_VALUES.or_none,
    base_model=TEXT.or_none,
)
def export_lora(
    adapter: Adapter,
    folder: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    trained_modules: Values | None = None,
    base_model: str | None = None,
    task: str | None = None,
) -> Path:
    """Write an adapter as a standard LoRA of PEFT, exactly: from the cut, without an SVD.

    The file is as plain as possible, so that every program can read it: one rank for all modules
    (smaller ones are filled with zeros), ``lora_alpha == r`` with all scaling in the tensors, no rank or
    alpha patterns, no bias.

    Args:
        adapter: an adapter; it need not be active.
        folder: the folder for ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: the model it belongs to, for the names in the configuration; by default the one that
            carries it.
        trained_modules: values of modules that were trained as a whole, by path and name; by default
            those that the adapter trained.
        base_model: name of the model in the configuration; the model's own by default.
        task: the task of an adapter with several; by default the one that is chosen.

    Returns:
        The folder.

    Raises:
        ValueError: a weight that LoRA has no pair for (see `lora_pairs`), a module trained as a whole
            whose weight is another module's too, or a number that is NaN or infinite; a task is asked for
            and the adapter has none, or it has several and none is chosen.
        KeyError: the adapter has other tasks.
        FileExistsError: the folder holds an adapter of lortalib in PEFT's form.
        OSError: the folder cannot be written. Files that were there stay unchanged.

    Example:
        >>> import tempfile, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "cp", rank=2)
        >>> sorted(path.name for path in export_lora(adapter, tempfile.mkdtemp()).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    _check_target(Path(folder))
    if adapter.is_on_model:
        warn_of_changes(adapter.require_host())
    if model is None and adapter.is_on_model:
        model = adapter.model
    if model is not None:
        divide_again(model)
    if task is not None:
        adapter = adapter.task(task)
    if trained_modules is None:
        _check_shared(adapter, model)
        own = adapter.trained_modules
        trained_modules = own.values(model) if own.paths else {}
    pairs = list(lora_pairs(adapter, model))
    rank = max(len(a) for _, a, _ in pairs)
    tensors = {}
    for path, a, b in pairs:
        name = f"{_PREFIX}{path}"
        tensors[f"{name}.lora_A.weight"] = plain(_fill(a, rank))
        tensors[f"{name}.lora_B.weight"] = plain(_fill(b.mT, rank).mT)
    for path, values in trained_modules.items():
        tensors |= {f"{_PREFIX}{path}.{k}": plain(v) for k, v in values.items()}
    check_numbers(tensors, f"adapter {adapter.name!r} was not exported")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _task(model, trained_modules),
        "base_model_name_or_path": base_model
        or getattr(getattr(model, "config", None), "_name_or_path", None)
        or None,
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
        "target_modules": _targets([path.removesuffix(f".{OUTPUT}") for path, *_ in pairs], model),
        "modules_to_save": sorted(trained_modules) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    _write(Path(folder), config, tensors)
    return Path(folder)


def _check_target(folder: Path) -> None:
    """Refuse a folder of PEFT that holds an adapter of lortalib, whose files have the same names."""
    if is_of_peft(folder):
        raise FileExistsError(
            f"{folder} holds an adapter of lortalib in PEFT's form, whose files those of the LoRA would "
            "replace; give another folder"
        )


def _check_shared(adapter: Adapter, model: nn.Module | None) -> None:
    """Refuse a trained module whose weight another module shares: PEFT would train a copy of it."""
    trained = adapter.trained_modules
    shared: SharedWeights | None = trained.shared if isinstance(trained, SavedModules) else None
    if model is not None:
        shared = shared_weights(model, trained.paths)
    if shared is None and trained.paths:
        warnings.warn(
            f"whether the weights of {', '.join(trained.paths)} are other modules' too can only be told "
            "with the model; where they are, PEFT computes something else. Pass model=...",
            stacklevel=outside(),
        )
    for path, others in (shared or {}).items():
        if others:
            raise ValueError(
                f"the module {path!r}, trained with the adapter, holds the same weight as "
                f"{', '.join(others)}; PEFT would give {path!r} a weight of its own, so the model would "
                "compute something else. Keep the folder of Adapter.save, or train all of these modules "
                f"(train_also={[path, *(name.rpartition('.')[0] for name in others)]})"
            )


def _fill(pair: Tensor, rank: int) -> Tensor:
    """Append rows of zeros up to the rank."""
    return pad(pair, (0, 0, 0, rank - len(pair)))


def _task(model: nn.Module | None, trained: Collection[str]) -> str | None:
    """Return PEFT's name for the task of the model; None if PEFT would look for a head that did not train."""
    if model is None:
        return None
    name = type(model).__name__
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if both and name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), "")
    heads = _HEADS.get(task, ())
    expected = [path for path in named_modules(model) if path.rpartition(".")[2] in heads]
    return task or None if set(expected) <= set(trained) else None


def _targets(paths: Sequence[str], model: nn.Module | None) -> list[str]:
    """Return the last words of the paths if they name no other module of the model, else the paths."""
    if model is not None:
        words = {path.rpartition(".")[2] for path in paths}
        named = {path for path in named_modules(model) if path.rpartition(".")[2] in words}
        if named == set(paths):
            return sorted(words)
    return sorted(set(paths))


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files. The weights carry a digest of themselves and of the fields that scale them."""
    text = json.dumps(config, indent=2) + "\n"
    metadata = sealed_metadata(__version__, config, tensors)
    put_files(
        folder,
        {
            WEIGHTS: lambda file: write_tensors(file, tensors, metadata),
            CONFIG: lambda file: write_text(file, text),
        },
    )
