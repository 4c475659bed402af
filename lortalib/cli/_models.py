"""Reads models by folder or name, with their weights or only their shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..nn.door import class_of, meta_model

#: The dtypes that ``--dtype`` accepts besides "auto"; transformers can load a model in each.
DTYPES = ("float16", "bfloat16", "float32", "float64")


def shape_of(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Make the model on the meta device, from its configuration alone; no weight is read.

    Args:
        name: name of a folder, or of a model on the hub.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        OSError: there is no such model.
        ValueError: no model can be made from the configuration.
    """
    with _told_of(name):
        config = AutoConfig.from_pretrained(_checked(name), trust_remote_code=trust_remote_code)
        found: PreTrainedModel = meta_model(config, trust_remote_code)
    return found


def load(name: str, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Read the model with its weights, as the class that its configuration names.

    Args:
        name: name of a folder, or of a model on the hub.
        dtype: dtype of the weights: one of `DTYPES`, or "auto" for the dtype of the stored weights.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        OSError: there is no such model.
        ValueError: the dtype is unknown, or no model can be made from the configuration.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"unknown dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    options: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "trust_remote_code": trust_remote_code,
    }
    with _told_of(name):
        config = AutoConfig.from_pretrained(_checked(name), trust_remote_code=trust_remote_code)
        model = class_of(config) or AutoModel
        found: PreTrainedModel = model.from_pretrained(name, **options)
    return found


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    """Add the model's name to errors that transformers raises for a damaged configuration."""
    try:
        yield
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:
        raise ValueError(
            f"no model can be made of the configuration of {name} "
            f"({type(error).__name__}: {error}). Look at its config.json"
        ) from error


def _checked(name: str) -> str:
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no config.json: it is no folder of a model")
    return name
