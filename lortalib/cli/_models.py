"""Models by folder or name, with their weights or only their shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel


def shape_of(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device, from its configuration alone: no weight is read.

    Raises:
        OSError: no such model.
        ValueError: a model type that transformers does not know.
    """
    config = AutoConfig.from_pretrained(_known(name), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = _class_of(config)
        made = model._from_config(config) if model else None
        found: PreTrainedModel = made or AutoModel.from_config(
            config, trust_remote_code=trust_remote_code
        )
    return found


def load(name: str, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model with its weights, of the class that its configuration names.

    Raises:
        OSError: no such model.
        ValueError: an unknown dtype.
    """
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(wanted, (str, torch.dtype)):
        raise ValueError(f"unknown dtype {dtype!r}; for instance float32, bfloat16 or auto")
    config = AutoConfig.from_pretrained(_known(name), trust_remote_code=trust_remote_code)
    model = _class_of(config) or AutoModel
    options: dict[str, Any] = {"dtype": wanted, "trust_remote_code": trust_remote_code}
    found: PreTrainedModel = model.from_pretrained(name, **options)
    return found


def _known(name: str) -> str:
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no config.json: it is no folder of a model")
    return name


def _class_of(config: Any) -> Any:
    """The class of transformers that the configuration names, if it names one."""
    names = getattr(config, "architectures", None) or []
    return next((found for n in names if (found := getattr(transformers, n, None))), None)
