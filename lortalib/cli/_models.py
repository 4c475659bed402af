"""Reads models by folder or name, with their weights or only their shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..nn.door import meta_model, model_class

#: The dtypes that ``--dtype`` accepts besides "auto"; transformers can load a model in each.
DTYPES = ("float16", "bfloat16", "float32", "float64")


def shape_of(name: str, trust_remote_code: bool = False) -> nn.Module:
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
        return meta_model(config, trust_remote_code)


def load(
    name: str, dtype: str, trust_remote_code: bool = False, whole: bool = False
) -> PreTrainedModel:
    """Read the model with its weights, as the class that its configuration names.

    Args:
        name: name of a folder, or of a model on the hub.
        dtype: dtype of the weights: one of `DTYPES`, or "auto" for the dtype of the stored weights.
        trust_remote_code: whether code that comes with the model may run.
        whole: whether every weight has to be in the files; transformers draws others at random.

    Raises:
        OSError: there is no such model.
        ValueError: the dtype is unknown, no model can be made from the configuration, or a weight is missing.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"unknown dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    options: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "trust_remote_code": trust_remote_code,
    }
    with _told_of(name):
        config = AutoConfig.from_pretrained(_checked(name), trust_remote_code=trust_remote_code)
        model = model_class(config) or AutoModel
        found: PreTrainedModel
        found, told = model.from_pretrained(name, output_loading_info=True, **options)
    missing = sorted(told["missing_keys"])
    if whole and missing:
        more = f" and {len(missing) - 3} more" * (len(missing) > 3)
        raise ValueError(
            f"{name} has no {', '.join(missing[:3])}{more}, for which transformers draws random numbers; "
            "nothing was written. Copy the folder again, or work in Python if another class is meant"
        )
    return found


def named_model(given: str | None, named: str | None, by: str) -> str:
    """Choose a model: the one given, or the folder that an adapter names. No name is looked up unasked.

    Args:
        given: what the user gave.
        named: what the adapter names.
        by: the adapter, for the message.

    Raises:
        ValueError: none is given, and none is named that is a folder here.
    """
    if given is not None:
        return given
    if named is None or not Path(named).is_dir():
        raise ValueError(
            f"{by} names {named!r} as its model, which is no folder here; give --model"
        )
    return named


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
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(
            f"there is no folder {name}; give a folder of a model, or a name on the hub, user/name"
        )
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{name} holds no config.json: it is no folder of a model. Give one"
        )
    return name


def example_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Make small inputs for a model of text or pictures, from its configuration.

    Args:
        model: a model of transformers.

    Raises:
        ValueError: the model reads neither tokens nor pixels.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    main = getattr(model, "main_input_name", None)
    if main == "input_ids":
        words = config.get_text_config().vocab_size
        ids = torch.randint(min(5, words - 1), words, (2, 8), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids[:, :5]
        return inputs
    if main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (1, getattr(config, "num_channels", 3), height, width)
        return {main: torch.randn(shape, generator=generator, dtype=model.dtype)}
    raise ValueError(
        f"{type(model).__name__} reads {main}, for which no example can be made here; check it from Python, "
        "with lortalib.nn.check_effect(adapter, inputs)"
    )
