"""Holds the adapters of a model by name, and pickles them with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from ._adapter import Adapter

#: In the pickle: the modules that train with each adapter, by the adapter's name.
_TRAINED = "_trained_modules"


class AdapterDict(nn.ModuleDict):
    """The adapters of one model by name.

    An adapter pickles as if it were on no model, so that it can be pickled alone. Unpickled with its model,
    it is on that model again.
    """

    def adapters(self) -> list[Adapter]:
        """Return every adapter, in the order in which they were applied."""
        return list(cast("Iterable[Adapter]", self.values()))

    def __getstate__(self) -> dict[str, Any]:
        trained = {adapter.name: adapter.trained_modules for adapter in self.adapters()}
        return {**self.__dict__, _TRAINED: trained}

    def __setstate__(self, state: dict[str, Any]) -> None:
        trained = state[_TRAINED]
        super().__setstate__({key: value for key, value in state.items() if key != _TRAINED})
        for name, adapter in zip(self, self.adapters()):
            adapter.trained_modules = trained[name]
            adapter.belong_to(cast(Any, self))


def home_of(model: nn.Module) -> nn.Module:
    """Return the module that the adapters of a model are registered in: the model itself, or the first
    module within a Sequential, because a Sequential runs every module that is registered in it.

    Args:
        model: the model.
    """
    while isinstance(model, nn.Sequential) and model._modules:
        model = next(model.children())
    return model
