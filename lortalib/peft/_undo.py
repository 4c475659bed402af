"""Restores a model after a call that changes the model fails."""

from __future__ import annotations

from typing import Any

from torch import nn


class Snapshot:
    """Remembers the attributes of every module of a model, and which parameters require gradients.

    Parameters, buffers, submodules and hooks are entries of dictionaries among the attributes, so `restore`
    also removes wrappers, adapters and hooks that were added later. A snapshot copies no tensor.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [
            (module, [(name, value, _entries(value)) for name, value in vars(module).items()])
            for module in model.modules()
        ]
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Restore all attributes and flags; may be called again."""
        for module, attributes in self._attributes:
            for name in vars(module).keys() - {name for name, *_ in attributes}:
                del vars(module)[name]
            for name, value, entries in attributes:
                vars(module)[name] = value
                if isinstance(value, list):
                    value[:] = entries
                elif entries is not None:
                    value.clear()
                    value.update(entries)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)


def _entries(value: Any) -> Any:
    """Copy a dictionary, list or set; return None for any other value."""
    for kind in (dict, list, set):
        if isinstance(value, kind):
            return kind(value)
    return None
