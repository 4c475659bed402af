"""Finds the updated modules of a model, also after other tools have moved them."""

from __future__ import annotations

from torch import nn

from ._anatomy import module_at


class FoundModules:
    """Finds modules by path, also after a tool such as PEFT has put a wrapper at the path.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[str, nn.Module] = {}

    def get_submodule(self, path: str) -> nn.Module:
        """Return the module that was first found at a path, if the module there now is or contains it;
        else the module there now.

        Args:
            path: path in the model.

        Raises:
            AttributeError: the model has no module at this path.
        """
        try:
            present = module_at(self._model, path)
        except AttributeError as error:
            if path not in self._known:
                raise
            raise AttributeError(
                f"{path}, which an adapter updates, was taken out of the model. Put it back to merge, "
                "unmerge or remove the adapter; or save the adapter and load it onto the model as it is now"
            ) from error
        known = self._known.setdefault(path, present)
        if known is not present and all(inner is not known for inner in present.modules()):
            known = self._known[path] = present
        return known
