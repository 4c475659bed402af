"""Removes the wrappers around a model, whose names would otherwise be part of every path."""

from __future__ import annotations

from torch import nn

#: The class name of each wrapper (its package may not be installed), and the path to the model in it.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DataParallel or DistributedDataParallel, or several of them.

    Args:
        model: a model, wrapped or not.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(model)) is model
        True
    """
    while isinstance(model, nn.Module) and type(model).__name__ in _WRAPPERS:
        model = model.get_submodule(_WRAPPERS[type(model).__name__])
    return model
