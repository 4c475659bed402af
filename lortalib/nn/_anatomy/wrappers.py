"""Looks through wrappers around a model, whose names would otherwise become part of every path."""

from __future__ import annotations

from torch import nn

#: Class of a wrapper, by name (its package need not be here), and the path to what it wraps.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile, DataParallel or DistributedDataParallel, or of several.

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
