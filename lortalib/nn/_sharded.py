"""Reads and writes tensors that FSDP2 divides over processes; every process must take part. Parameters that
DeepSpeed ZeRO-3 divides can be read only while the user gathers them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..decomp import NetworkView, TensorNetwork


def processes() -> int:
    """Count the processes that train together."""
    distributed = torch.distributed
    running = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if running else 1


def is_divided(tensor: Any) -> bool:
    """Return True if a tensor is divided over processes."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Any:
    """Gather a tensor that is divided over processes, differentiably; return any other tensor unchanged.

    Raises:
        RuntimeError: DeepSpeed ZeRO-3 divides the tensor, and the user has not gathered it.
    """
    check_gathered(tensor)
    return tensor.full_tensor() if is_divided(tensor) else tensor


def check_gathered(tensor: Any) -> None:
    """Refuse a parameter that DeepSpeed ZeRO-3 divides: it is empty outside of its modules' forwards.

    Raises:
        RuntimeError: the parameter is divided now.
    """
    if is_zero_parameter(tensor) and tuple(tensor.ds_shape) != tuple(tensor.shape):
        raise RuntimeError(
            f"DeepSpeed ZeRO-3 divides a parameter of shape {tuple(tensor.ds_shape)} over processes; do this "
            "in every process within `with deepspeed.zero.GatheredParameters(list(model.parameters())):`"
        )


def is_zero_parameter(tensor: Any) -> bool:
    """Return True if DeepSpeed ZeRO-3 manages a parameter."""
    return hasattr(tensor, "ds_shape")


def whole_network(network: TensorNetwork) -> TensorNetwork:
    """Gather the tensors of a network; return the network itself if none is divided."""
    stored = network.stored
    found = [whole(tensor) for tensor in stored]
    if all(one is other for one, other in zip(found, stored)):
        return network
    tensors = network.spread(found)
    return NetworkView(network.legs, tensors, network.modes)


def divided_like(tensor: Any, other: Any) -> Any:
    """Make a tensor whole, or divide it over processes, in the same way as another tensor."""
    if not is_divided(other):
        return whole(tensor)
    same = is_divided(tensor) and tensor.device_mesh == other.device_mesh
    if same and tensor.placements == other.placements:
        return tensor
    from torch.distributed.tensor import distribute_tensor  # costs a second, and few need it

    return distribute_tensor(whole(tensor).to(other.device), other.device_mesh, other.placements)


def is_finite(tensor: Tensor) -> bool:
    """Return True if every entry is finite, on every process."""
    broken: Tensor = whole(torch.isfinite(tensor).logical_not().sum())
    return not broken.item()


def sharded_parts(model: nn.Module) -> list[Any]:
    """Find the modules of a model that FSDP2 divides over processes."""
    return [module for module in model.modules() if type(module).__name__.startswith("FSDP")]


def divide_again(model: nn.Module) -> list[Any]:
    """Let FSDP2 divide gathered parameters again, because changes of gathered parameters would be lost.

    Returns:
        The modules that FSDP2 divides.
    """
    parts = sharded_parts(model)
    for part in parts:
        part.reshard()
    return parts
