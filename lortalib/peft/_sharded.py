"""Lets FSDP2 divide gathered parameters again before PEFT changes weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from ..nn import door
from ._layer import LortaLayer


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weight of every layer of PEFT that has adapters, by its path.

    Args:
        model: the model.
    """
    named = model.named_modules()
    return {path: layer.weight for path, layer in named if isinstance(layer, LortaLayer)}


def divide_again(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let FSDP2 divide gathered parameters again, so that changes of weights are not lost.

    Args:
        model: the model; if FSDP2 divides no part of it, nothing happens.
        weights: the weights that are to change, by path of their module.
    """
    parts = door.divide_again(model)
    left = [path for path, weight in weights.items() if not door.is_divided(weight)]
    if parts and left:
        warnings.warn(
            f"FSDP2 divides other weights of the model, but not that of {left[0]}. If it gathered it for a "
            "forward, its change will be lost: call reshard() on the outermost model before merging",
            stacklevel=5,
        )
