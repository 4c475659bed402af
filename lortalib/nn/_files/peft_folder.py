"""Reads and writes the folder of PEFT's `save_pretrained`: the same adapter under PEFT's names.

Its configuration has the fields of `lortalib.peft.LortaConfig`, and under ``description`` what
``adapter.safetensors`` says of an adapter. PEFT is not needed to read or write it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...decomp import LegsError, get_format
from .._adapter import Adapter
from .describe import describe
from .folder import (
    CONFIG_OF_PEFT,
    METHOD,
    TENSORS_OF_PEFT,
    AdapterFileError,
    put_files,
    read_json,
    write_text,
)
from .records import short
from .schema import FORMAT, Description, trained_key, values_of
from .tensors import write_tensors

_NETWORKS = "base_model.lorta_adapters."
_MODEL = "base_model.model."


def read_peft(file: Path, keys: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the description of an adapter in a folder of PEFT, unchecked.

    Args:
        file: the file of its tensors.
        keys: the names of all tensors in it.

    Returns:
        The description, and the name in the file of each tensor by the name that lortalib gives it.

    Raises:
        AdapterFileError: the configuration is damaged, of another method, or without a description.
        ValueError: a tensor that is no part of an adapter of lortalib.
    """
    config = read_json(file.with_name(CONFIG_OF_PEFT))
    if not isinstance(config, dict) or config.get("peft_type") != METHOD:
        raise AdapterFileError(
            f"{file.parent} holds an adapter of another method of PEFT; open a LoRA with "
            "lortalib.nn.load_lora or `lortalib from-lora`, others with peft.PeftModel.from_pretrained"
        )
    description = config.get("description")
    if not isinstance(description, dict):
        raise AdapterFileError(
            f"{file.parent} has no description of its adapter, because it was saved by an early lortalib; "
            "open it with peft.PeftModel.from_pretrained and call save_pretrained once more"
        )
    if description.get("format") != FORMAT:
        raise ValueError(f"{CONFIG_OF_PEFT} does not describe an adapter of lortalib")
    named = config.get("modules_to_save") or ()
    names, trained = {}, []
    for key in keys:
        if key.startswith(_NETWORKS):
            names[key.removeprefix(_NETWORKS)] = key
            continue
        path = _trained_path(key, named)
        names[trained_key(path, key[len(_MODEL) + len(path) + 1 :])] = key
        trained.append(path)
    return {**description, "trained_modules": list(dict.fromkeys(trained))}, names


def _trained_path(key: str, named: Any) -> str:
    """Find the path of the module of ``modules_to_save`` that a tensor is a part of."""
    inner = key.removeprefix(_MODEL)
    words = inner.split(".")
    paths = (".".join(words[:k]) for k in range(1, len(words))) if inner != key else iter(())
    for path in paths:
        if isinstance(named, list) and any(f".{path}".endswith(f".{name}") for name in named):
            return path
    raise ValueError(
        f"{short(key)} is no factor and no value of modules_to_save; if rows of an embedding train "
        "(trainable_token_indices), only PEFT reads them: peft.PeftModel.from_pretrained"
    )


def write_peft(description: Description, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter as ``save_pretrained`` of PEFT writes it.

    Args:
        description: what its file says.
        tensors: all tensors of the file, by name.
        folder: where to write; it is made if it does not exist.

    Raises:
        OSError: the folder cannot be written.
        ValueError: an adapter that PEFT cannot hold; the message says why.
    """
    _check_peft_holds(description)
    config, trained = description.config, description.trained_modules
    value = {
        "peft_type": METHOD,
        "task_type": None,
        "base_model_name_or_path": description.base_model.get("name"),
        "inference_mode": True,
        "decomposition": config.decomposition,
        "rank": max(
            (
                n
                for g in description.groups
                for bond, n in g.ranks.items()
                if bond not in g.line.vectors
            ),
            default=1,
        ),
        "ranks": {group.name: group.ranks for group in description.groups},
        "alpha": config.scaling,
        "dropout": config.dropout,
        "gqa": config.gqa,
        "acts_on": config.acts_on,
        "init_weights": True,
        "target_modules": sorted(
            {path for site in description.sites() for path in (site.path, *site.tied_paths)}
        ),
        "modules_to_save": list(trained) or None,
        # Which weights other modules share was seen on the model, which is not here.
        "description": _for_configuration(description, ("trained_modules",)),
    }
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    named = {
        key: f"{_MODEL}{path}.{name}"
        for path, names in values_of(description, tensors).items()
        for name, key in names.items()
    }
    stored = {named.get(key, _NETWORKS + key): tensor for key, tensor in tensors.items()}
    put_files(
        folder,
        {
            TENSORS_OF_PEFT: lambda file: write_tensors(file, stored, {"format": "pt"}),
            CONFIG_OF_PEFT: lambda file: write_text(file, text),
        },
    )


def describe_for_peft(adapter: Adapter, model: nn.Module) -> dict[str, Any]:
    """Return the ``description`` of an adapter in the configuration of PEFT.

    Args:
        adapter: an adapter.
        model: the model that carries it.
    """
    return _for_configuration(describe(adapter, model), ("trained_modules", "shared_weights"))


def _for_configuration(description: Description, without: Collection[str]) -> dict[str, Any]:
    """Return a description as JSON, without fields that follow from the tensors or from the model."""
    value = {k: v for k, v in asdict(description).items() if k not in without}
    found: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return found


def _check_peft_holds(description: Description) -> None:
    for site in description.sites():
        if site.experts or site.weight_read_directly:
            what = "packs experts" if site.experts else "is read without its module being called"
            raise ValueError(
                f"{site.path}.{site.parameter} {what}, so no wrapper of PEFT can hold its update; keep the "
                "adapter as it is, or merge it"
            )
    if description.config.share_residual:
        raise ValueError(
            "share_residual=True: tensors of PEFT have no factor in common; keep the adapter as it is"
        )
    if description.tasks:
        raise ValueError(
            f"the adapter has the tasks {', '.join(map(repr, description.tasks))}, and PEFT chooses whole "
            f"adapters by name: write one alone, with task={description.tasks[0]!r}"
        )
    try:
        made = get_format(description.config.decomposition)
    except (LegsError, ValueError) as error:
        raise ValueError(
            f"the decomposition {description.config.decomposition!r} is a function, which no configuration "
            "of PEFT can name; keep the adapter as it is"
        ) from error
    for group in description.groups:
        if made.legs(group.modes).unmarked != group.line.unmarked:
            raise ValueError(
                f"the tensor {group.name!r} has the legs\n    {group.legs}\nand PEFT would make\n    "
                f"{made.legs(group.modes)}\nof {description.config.decomposition!r}; keep the adapter as it "
                "is"
            )
