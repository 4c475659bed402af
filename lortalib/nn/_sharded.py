"""Reads and writes what FSDP2 divides over processes; every process has to take part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..decomp import NetworkView, TensorNetwork


def is_divided(tensor: Any) -> bool:
    """Whether every process holds a part of a tensor."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Any:
    """Gather a tensor that is divided over processes; any other is returned as it is. Differentiable."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def whole_network(network: TensorNetwork) -> TensorNetwork:
    """A network with whole tensors; the very same where none is divided."""
    stored = network.stored
    if not any(is_divided(tensor) for tensor in stored):
        return network
    tensors = network.spread([whole(tensor) for tensor in stored])
    return NetworkView(network.legs, tensors, network.modes)


def divided_like(tensor: Any, other: Any) -> Any:
    """A tensor as another one is held: whole, or divided over the processes in the same way."""
    if not is_divided(other):
        return whole(tensor)
    same = is_divided(tensor) and tensor.device_mesh == other.device_mesh
    if same and tensor.placements == other.placements:
        return tensor
    from torch.distributed.tensor import distribute_tensor  # costs a second, and few need it

    return distribute_tensor(whole(tensor).to(other.device), other.device_mesh, other.placements)


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, on any process."""
    broken: Tensor = whole(torch.isfinite(tensor).logical_not().sum())
    return not broken.item()


def sharded_parts(model: nn.Module) -> list[Any]:
    """The modules of a model that FSDP2 divides over processes."""
    return [module for module in model.modules() if type(module).__name__.startswith("FSDP")]


def divide_again(model: nn.Module) -> None:
    """Let FSDP2 divide what it gathered for a forward: a change of the gathered weights would be lost."""
    for part in sharded_parts(model):
        part.reshard()
