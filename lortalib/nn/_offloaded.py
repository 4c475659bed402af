"""Finds the parameters that accelerate offloads: their modules have placeholders between two forwards, and
the numbers are in a map that accelerate's hook of the module keeps.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate by which a module's parameters are offloaded."""
    hook: Any = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            yield each


def offloaded_numbers(module: nn.Module, name: str) -> Tensor | None:
    """The numbers of an offloaded parameter, read from where accelerate keeps them.

    Args:
        module: the module that has it.
        name: its name there.

    Returns:
        The tensor in main memory, or what was read from a disk; None where nothing is offloaded.
    """
    parameter = module._parameters.get(name)
    if parameter is None or not parameter.is_meta:
        return None
    found: Tensor | None = next((hook.weights_map[name] for hook in _hooks(module)), None)
    return found


def is_on_disk(module: nn.Module, name: str) -> bool:
    """Whether an offloaded parameter is read from a disk each time, so that writes to it are lost.

    Args:
        module: the module that has it.
        name: its name there.
    """
    for hook in _hooks(module):
        numbers, again = hook.weights_map[name], hook.weights_map[name]
        return bool(numbers.data_ptr() != again.data_ptr())
    return False


def has_no_numbers(model: nn.Module) -> bool:
    """Whether a parameter of the model is a placeholder whose numbers nobody keeps."""
    return any(
        parameter.is_meta and not any(_hooks(module))
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )


def check_unshared(module: nn.Module) -> None:
    """Refuse a module whose weight is offloaded and also another module's: brought back, the two would part.

    Args:
        module: one whose parameters train.

    Raises:
        ValueError: it is such a module.
    """
    for path, part in module.named_modules():
        if any(hook.tied_params_names for hook in _hooks(part)):
            raise ValueError(
                f"{path or type(part).__name__} trains, and accelerate offloads its weight, which is also "
                "that of another module: the two would part. Leave both out of the offloading "
                "(device_map), or out of train_also"
            )


def bring_back(module: nn.Module, without: Container[str] = ()) -> None:
    """Let the parameters of a module, and of those within it, stay where the module computes.

    They remain the very same objects, so an optimiser that has them trains them. accelerate's hooks still
    move the inputs.

    Args:
        module: one whose parameters train; nothing happens where none of them is offloaded.
        without: names of its parameters that stay what they are.
    """
    for part in module.modules():
        for hook in list(_hooks(part)):
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.is_meta and name not in without:
                    _fill(parameter, hook.weights_map[name], hook.execution_device)
            hook.offload = False


def _fill(parameter: nn.Parameter, numbers: Tensor, device: Any) -> None:
    """Give a placeholder a copy of its numbers."""
    with torch.no_grad():
        copy = numbers.to("cpu" if device is None else device, copy=True)
        torch.utils.swap_tensors(parameter, nn.Parameter(copy, parameter.requires_grad))
