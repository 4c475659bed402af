"""The modules of a model that are updated, wherever other tools move them."""

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
        """The module that was first found at a path, if it is there still or within what is there now;
        else what is there now.

        Args:
            path: in the model.

        Raises:
            AttributeError: nothing is there.
        """
        present = module_at(self._model, path)
        known = self._known.setdefault(path, present)
        if known is not present and all(inner is not known for inner in present.modules()):
            known = self._known[path] = present
        return known
