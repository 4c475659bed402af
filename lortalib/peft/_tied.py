"""Weights that several modules hold, which merging would change in all of them."""

from __future__ import annotations

from torch import nn

from ._layer import LortaLayer


def check_tied(model: nn.Module) -> None:
    """Refuse to merge where a weight is also that of a module which the adapters do not change alike.

    Args:
        model: the model with its layers.

    Raises:
        ValueError: such a weight; the message names both modules.
    """
    holders: dict[int, list[str]] = {}
    layers: dict[str, LortaLayer] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append(path)
        if isinstance(module, LortaLayer):
            layers[f"{path}.base_layer"] = module
    for path, layer in layers.items():
        for other in holders.get(id(layer.get_base_layer()._parameters.get("weight")), []):
            alike = layers.get(other)
            if alike is None or alike.places() != layer.places():
                raise ValueError(
                    f"the weight of {path.removesuffix('.base_layer')} is also that of {other}, which the "
                    "adapter does not change in the same way; merging would change both. Untie them first "
                    "(tie_word_embeddings=False), or leave the adapter unmerged"
                )
