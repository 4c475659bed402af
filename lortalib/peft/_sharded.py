"""Reads and writes what FSDP2 divides over processes; every process has to take part."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..nn import Adapter
from ..nn.door import Plan, make_adapter


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that is divided over processes; any other is returned as it is."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def whole_adapter(adapter: Adapter) -> Adapter:
    """Make an adapter with the whole factors of one that is divided; any other is returned as it is."""
    if not any(hasattr(tensor, "full_tensor") for tensor in adapter.networks.parameters()):
        return adapter
    networks = {}
    for group in adapter.groups:
        network = adapter.network(group)
        networks[group.name] = network.like([whole(t.detach()) for t in network.stored])
    return make_adapter(adapter.name, Plan(adapter.groups, networks, adapter.config))


def divided_like(tensor: Tensor, weight: Any) -> Tensor:
    """Divide a whole tensor as a weight is, if it is."""
    if not hasattr(weight, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # costs a second, and few need it

    return distribute_tensor(tensor, weight.device_mesh, weight.placements)


def divide_again(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let FSDP2 divide what it gathered for a forward, so that a change of a weight is not lost.

    Args:
        model: the model; nothing happens where FSDP2 divides no part of it.
        weights: those that are to change, by path of their module.
    """
    parts = [module for module in model.modules() if type(module).__name__.startswith("FSDP")]
    for module in parts:
        reshard: Any = module.reshard
        reshard()
    left = [path for path, weight in weights.items() if not hasattr(weight, "device_mesh")]
    if parts and left:
        warnings.warn(
            f"FSDP2 divides other weights of the model, but not that of {left[0]}. If it gathered it for a "
            "forward, its change will be lost: call reshard() on the outermost model before merging",
            stacklevel=4,
        )
