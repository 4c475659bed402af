"""Looks through the wrappers around a model and its parts, whose names would be part of every path."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

#: The class name of each wrapper (its package may not be installed), and the path to the model in it.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "AveragedModel": "module",  # torch.optim.swa_utils
}
#: Names that wrappers of parts put into a path. A path without them leads to the wrapper, which hands other
#: names on to what it wraps.
_NAMES = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DataParallel, DistributedDataParallel or a PeftModel, or
    several of them.

    Args:
        model: a model, wrapped or not.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(model)) is model
        True
    """
    *_, found = wrappers(model)
    return found


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """List a model, and what is in it as long as that is a whole model; the last one is the plain model.

    Args:
        model: a model, wrapped or not.
    """
    yield model
    path = _WRAPPERS.get(type(model).__name__)
    if path is not None:
        yield from wrappers(model.get_submodule(path))
    elif any(kind.__name__ == "PeftModel" for kind in type(model).__mro__):
        yield from wrappers(model.get_base_model())  # type: ignore[operator]


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path of the plain model, out of its wrappers.

    Args:
        model: a model, parts of which may be wrapped by torch.compile, for checkpointing, or by PEFT.
        path: a path that `named_modules` gives.

    Raises:
        AttributeError: nothing is there.
    """
    module = model.get_submodule(path)
    while inner := [child for name, child in module.named_children() if name in _NAMES]:
        module = inner[0]
    return module


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by their paths in the plain model; a wrapper is not among them.

    Args:
        model: a model, parts of which may be wrapped by torch.compile or for checkpointing.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model[0] = torch.compile(model[0])
        >>> [(path, type(module).__name__) for path, module in named_modules(model).items()]
        [('', 'Sequential'), ('0', 'Linear')]
    """
    return {plain_name(path): module for path, module in model.named_modules()}


def plain_name(path: str) -> str:
    """Return a path without the names that wrappers of parts put into it.

    Args:
        path: of a module or a parameter.

    Example:
        >>> plain_name("model._orig_mod.layers.0.weight")
        'model.layers.0.weight'
    """
    return ".".join(word for word in path.split(".") if word not in _NAMES)
