"""Refuses weights that adapters cannot be merged into, or taken out of, before any weight is changed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..nn import Site
from ..nn.door import check_stored
from ._layer import LortaLayer
from ._sharded import divide_again, weights_of


def prepare_to_merge(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Check that adapters can be merged, and let FSDP2 divide gathered parameters again.

    Args:
        model: the model with PEFT's layers.
        adapter_names: the adapters that are to be merged; the active adapters by default.

    Raises:
        ValueError: a weight is computed, or shared with a module that the adapters do not change alike.
    """
    _check_mergeable(model, adapter_names)
    divide_again(model, weights_of(model))


def _check_mergeable(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Refuse to merge if a weight is shared with a module that the adapters do not change in the same way, or
    is computed from other parameters.

    Args:
        model: the model with PEFT's layers.
        adapter_names: the adapters that are to be merged; the active adapters by default.

    Raises:
        ValueError: there is such a weight; the message names both modules.
    """
    holders: dict[int, list[str]] = {}
    updates: dict[str, dict[str, list[Site]]] = {}
    weights: dict[str, nn.Parameter | None] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(path)
        if isinstance(module, LortaLayer):
            names = module.active_adapters if adapter_names is None else adapter_names
            own = {name: sites for name, sites in module.sites().items() if name in names}
            if own:
                check_stored(module.get_base_layer(), "weight", path)
                updates[f"{path}.base_layer"] = own
                weights[f"{path}.base_layer"] = module.get_base_layer()._parameters.get("weight")
    for path, own in updates.items():
        for other in holders.get(id(weights[path]), []):
            if updates.get(other) != own:
                one, two = (name.removesuffix(".base_layer") for name in (path, other))
                raise ValueError(
                    f"the weight of {one} is also that of {two}, which the adapter does not change in the "
                    "same way; merging would change both. Untie them first (tie_word_embeddings=False), or "
                    "leave the adapter unmerged"
                )


def prepare_to_unmerge(model: nn.Module) -> None:
    """Check that adapters can be taken out of the weights, and let FSDP2 divide gathered parameters again.

    Args:
        model: the model with PEFT's layers.

    Raises:
        ValueError: a weight is computed from other parameters since it was merged.
    """
    for path, module in model.named_modules():
        if isinstance(module, LortaLayer) and module.merged:
            check_stored(module.get_base_layer(), "weight", path)
    divide_again(model, {})
