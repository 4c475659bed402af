"""Notices updated modules that other code has replaced since their hooks were put on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..._torch import children_of, hooks_of

Link = tuple[dict[str, nn.Module | None], str, nn.Module]


class Places:
    """The places of updated modules in their model. A module that other code puts there later, as a tool
    for another precision does, has no hook, so it would run without the update and without a word.

    Args:
        model: the model, with the hooks on its modules.
        paths: the paths of the updated modules.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> places = Places(model, ["0", "1"])
        >>> model[1] = nn.Linear(2, 2)
        >>> places.replaced()
        ['1']
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self._model = model
        self._modules = {path: model.get_submodule(path) for path in paths}
        self._links = self._chains()

    def replaced(self) -> list[str]:
        """List the paths at which another module is now. A wrapper around the module is none, nor is a
        module that took its hooks over. Costs next to nothing while no module of the model has changed."""
        if all(children.get(name) is module for children, name, module in self._links):
            return []
        updated = {id(module) for module in self._modules.values()}
        updated |= {id(hook) for module in self._modules.values() for hook in _hooks(module)}
        found = [path for path in self._modules if self._is_replaced(path, updated)]
        if not found:
            self._links = self._chains()
        return found

    def remove(self) -> None:
        """Forget the model, when its hooks are removed; may be called again."""
        self._model, self._modules, self._links = nn.Module(), {}, []

    def _chains(self) -> list[Link]:
        """List the modules on the way to the updated ones, each with the dictionary that it stands in."""
        links: dict[tuple[int, str], Link] = {}
        for path in self._modules:
            module = self._model.get_submodule("")
            for name in path.split("."):
                children = children_of(module)
                child = children.get(name)
                if child is None:  # behind a wrapper that passes names on, or taken out
                    break
                links[id(module), name] = children, name, child
                module = child
        return list(links.values())

    def _is_replaced(self, path: str, updated: set[int]) -> bool:
        """Return True if nothing at a path has an update.

        Args:
            path: the path of an updated module.
            updated: the ids of all updated modules and their hooks; layers may have changed places.
        """
        try:
            present = self._model.get_submodule(path)
        except AttributeError:  # the part of the model was taken out, and does not run
            return False
        return not any(
            id(each) in updated or not updated.isdisjoint(map(id, _hooks(each)))
            for each in present.modules()
        )


def _hooks(module: nn.Module) -> list[object]:
    """List the hooks of a module that add updates."""
    return [hook for hook in hooks_of(module) if hasattr(hook, "update")]
