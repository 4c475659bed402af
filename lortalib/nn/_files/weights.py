"""Finds the modules of a model that share one weight, such as a head tied to an embedding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from .._anatomy import ATTRIBUTE, plain_name
from .._trained_modules import TrainedModules, Values

#: For the path of a module, weights of other modules that are the same tensor as one of its own.
SharedWeights = Mapping[str, tuple[str, ...]]


def shared_weights(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Find, for each of these modules, weights elsewhere in the model that are the same tensor as its own.

    Args:
        model: the model.
        paths: paths of modules in it. Weights inside such a module do not count as elsewhere.

    Example:
        >>> model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
        >>> model["second"].weight = model["first"].weight
        >>> shared_weights(model, ["second"]), shared_weights(model, ["first", "second"])
        ({'second': ('first.weight',)}, {'first': (), 'second': ()})
    """
    paths = list(paths)
    elsewhere: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not any(plain_name(name).startswith(f"{path}.") for path in (*paths, ATTRIBUTE)):
            elsewhere.setdefault(id(parameter), []).append(plain_name(name))
    return {
        path: tuple(
            name
            for parameter in model.get_submodule(path).parameters()
            for name in elsewhere.get(id(parameter), [])
        )
        for path in paths
    }


class SavedModules(TrainedModules):
    """Modules that were trained as a whole, read from a file that records shared weights.

    Args:
        values: the adapter's own values, by path of the module and name in it.
        shared: for each module, the weights of other modules that were the same tensor as its own; None
            if the file does not say.
    """

    def __init__(self, values: Values, shared: SharedWeights | None) -> None:
        super().__init__(tuple(values), values)
        self.shared = shared
