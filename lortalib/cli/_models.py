"""Reads models by folder or name, with their weights or only their shapes."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..nn.door import HubPlace, meta_model, model_class
from ._place import place_of_model

#: The files by which the folder of an adapter is known.
ADAPTER_FILES = ("adapter.safetensors", "adapter_config.json")
#: The dtypes that ``--dtype`` accepts besides "auto"; transformers can load a model in each.
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Base(NamedTuple):
    """A model that a command is about.

    Attributes:
        name: a folder, or the name of a model on the hub.
        place: where in the repository or folder it is.
        trust_remote_code: whether code that comes with the model may run.
    """

    name: str
    place: HubPlace
    trust_remote_code: bool

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``from_pretrained``."""
        place = {key: value for key, value in self.place.items() if value is not None}
        return {**place, "trust_remote_code": self.trust_remote_code}


def base_of(options: Namespace, name: str) -> Base:
    """Return the model of a command.

    Args:
        options: the options of the command, as `add_model_place` and `add_trust` add them.
        name: a folder, or the name of a model on the hub.
    """
    return Base(name, place_of_model(options), options.trust_remote_code)


def shape_of(base: Base) -> nn.Module:
    """Make the model on the meta device, from its configuration alone; no weight is read.

    Args:
        base: the model.

    Raises:
        OSError: there is no such model.
        ValueError: no model can be made from the configuration.
    """
    with _told_of(base):
        return meta_model(_config(base), base.trust_remote_code)


def load(base: Base, dtype: str, whole: bool = False) -> PreTrainedModel:
    """Read the model with its weights, as the class that its configuration names.

    Args:
        base: the model.
        dtype: dtype of the weights: one of `DTYPES`, or "auto" for the dtype of the stored weights.
        whole: whether every weight has to be in the files; transformers draws others at random.

    Raises:
        OSError: there is no such model.
        ValueError: the dtype is unknown, no model can be made from the configuration, or a weight is missing.
    """
    chosen = dtype if dtype == "auto" else dtype_of(dtype)
    with _told_of(base):
        model = model_class(_config(base)) or AutoModel
        found: PreTrainedModel
        found, told = model.from_pretrained(
            base.name, dtype=chosen, output_loading_info=True, **base.options
        )
    missing = sorted(told["missing_keys"])
    if whole and missing:
        more = f" and {len(missing) - 3} more" * (len(missing) > 3)
        raise ValueError(
            f"{base.name} has no {', '.join(missing[:3])}{more}, for which transformers draws random "
            "numbers; nothing was done. Copy the folder again, or work in Python if another class is meant"
        )
    return found


def tokenizer_of(base: Base) -> Any:
    """Read the tokenizer of a model.

    Args:
        base: the model.

    Raises:
        OSError: there is no such model.
        ValueError: it has no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer  # deferred on purpose: it takes a while to import

    _check(base)
    try:
        return AutoTokenizer.from_pretrained(base.name, **base.options)
    except Exception as error:  # transformers has no class for it
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"the tokenizer of {base.name} cannot be read ({why}); save one beside the model"
        ) from error


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a name.

    Args:
        name: one of `DTYPES`.

    Raises:
        ValueError: another name.
    """
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose auto, {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def _config(base: Base) -> Any:
    _check(base)
    return AutoConfig.from_pretrained(base.name, **base.options)


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
def _told_of(base: Base) -> Iterator[None]:
    """Add the model's name to errors that transformers raises for a damaged configuration."""
    try:
        yield
    except OSError as error:
        if Path(base.name).exists() or base.name in str(error):
            raise
        # What transformers says of a network does not name the model.
        raise OSError(
            f"there is no folder {base.name!r} here, and the hub gave no such model: {error}"
        ) from error
    except (ValueError, ImportError):
        raise
    except Exception as error:
        raise ValueError(
            f"no model can be made of the configuration of {base.name} "
            f"({type(error).__name__}: {error}). Look at its config.json"
        ) from error


def _check(base: Base) -> None:
    """Refuse a path without a model, before transformers takes it for a name on the hub."""
    name, path = base.name, Path(base.name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(
            f"there is no folder {name}; give a folder of a model, or a name on the hub, user/name"
        )
    if path.exists() and base.place["revision"] is not None:
        raise ValueError(
            f"the revision {base.place['revision']!r} goes with a model on the hub, user/name, but {name!r} "
            "is a path on this machine; leave it out"
        )
    folder = path / (base.place["subfolder"] or ".")
    if path.exists() and not (folder / "config.json").is_file():
        what = (
            ", but an adapter" if any((folder / file).is_file() for file in ADAPTER_FILES) else ""
        )
        raise FileNotFoundError(
            f"{folder} holds no config.json{what}: it is no folder of a model. Give one"
        )


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
