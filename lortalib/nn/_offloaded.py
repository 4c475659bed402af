"""Finds the parameters that accelerate offloads. Between two forwards their modules have parameters on the
meta device, and the hook that accelerate puts on the module keeps their values in a map.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks of accelerate that offload a module's parameters."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            yield each


def offloaded_numbers(module: nn.Module, name: str) -> Tensor | None:
    """Read the values of an offloaded parameter from the map of accelerate's hook.

    Args:
        module: the module that has the parameter.
        name: name of the parameter in the module.

    Returns:
        The tensor in main memory, or a tensor read from a disk; None if the parameter is not offloaded.
    """
    parameter = module._parameters.get(name)
    if parameter is None or not parameter.is_meta:
        return None
    found: Tensor | None = next((hook.weights_map[name] for hook in _hooks(module)), None)
    return found


def execution_device(module: nn.Module, weight: Tensor) -> torch.device:
    """Return the device that a module computes on: the device of its weight, or, for a weight that
    accelerate offloads, the device that accelerate brings the weight to.

    Args:
        module: the module that has the weight.
        weight: the weight.
    """
    if not weight.is_meta:
        return weight.device
    found = [hook.execution_device for hook in _hooks(module)]
    return torch.device("cpu" if found[0] is None else found[0]) if found else weight.device


def is_on_disk(module: nn.Module, name: str) -> bool:
    """Return True if an offloaded parameter is read from a disk each time, so that writes to it are lost.

    Args:
        module: the module that has the parameter.
        name: name of the parameter in the module.
    """
    for hook in _hooks(module):
        numbers, again = hook.weights_map[name], hook.weights_map[name]
        return bool(numbers.data_ptr() != again.data_ptr())
    return False


def has_no_numbers(model: nn.Module) -> bool:
    """Return True if a parameter of the model is on the meta device and accelerate keeps no values of it."""
    return any(
        parameter.is_meta and not any(_hooks(module))
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )


def check_unshared(module: nn.Module) -> None:
    """Refuse a module with an offloaded weight that another module shares: bringing it back ends the sharing.

    Args:
        module: a module whose parameters train.

    Raises:
        ValueError: the module has such a weight.
    """
    for path, part in module.named_modules():
        if any(hook.tied_params_names for hook in _hooks(part)):
            raise ValueError(
                f"{path or type(part).__name__} trains, and accelerate offloads its weight, which is also "
                "that of another module: the two would part. Leave both out of the offloading "
                "(device_map), or out of train_also"
            )


def bring_back(module: nn.Module, without: Container[str] = ()) -> None:
    """Bring the offloaded parameters of a module and its submodules back to the device that computes.

    The parameters remain the same objects, so an optimiser that has them trains them. accelerate's hooks
    still move the inputs.

    Args:
        module: a module whose parameters train; if none of them is offloaded, nothing happens.
        without: names of parameters that are not brought back.
    """
    for part in module.modules():
        for hook in list(_hooks(part)):
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.is_meta and name not in without:
                    _fill(parameter, hook.weights_map[name], hook.execution_device)
            hook.offload = False


def _fill(parameter: nn.Parameter, numbers: Tensor, device: Any) -> None:
    """Replace a parameter on the meta device by a copy of its values; the object stays the same."""
    with torch.no_grad():
        copy = numbers.to("cpu" if device is None else device, copy=True)
        torch.utils.swap_tensors(parameter, nn.Parameter(copy, parameter.requires_grad))
