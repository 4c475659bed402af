"""Answers for the adapters of a PEFT model: what of `lortalib.nn` they can do, and what is PEFT's to do."""

from __future__ import annotations

from typing import Any, NoReturn

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..nn import Site
from ._layer import LortaLayer


class PeftHost:
    """Carries the adapters of a model for PEFT, whose calls switch, merge, save and delete them.

    Args:
        model: the model with PEFT's layers in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def base_weight(self, site: Site) -> Tensor:
        """Return a weight as it is without anything merged into it."""
        layer = self.model.get_submodule(site.path)
        assert isinstance(layer, LortaLayer)
        return layer.unmerged_weight

    def bring_back(self, adapter: Any) -> None:
        """Let the modules that PEFT trains with an adapter stay where they compute, if accelerate offloads
        them."""
        paths = [
            f"{path}.modules_to_save.{adapter.name}"
            for path, module in self.model.named_modules()
            if isinstance(module, ModulesToSaveWrapper) and adapter.name in module.modules_to_save
        ]
        adapter.trained_modules.bring_back(self.model, paths)

    def prepare_files(self, adapter: Any) -> NoReturn:
        """Refuse: PEFT may train modules with it that only PEFT's files know."""
        _refuse(adapter, "save_pretrained(folder), or base_model.export_lora(folder)")

    def enable(self, adapter: Any) -> NoReturn:
        """Refuse."""
        _refuse(adapter, "set_adapter(name)")

    def disable(self, adapter: Any) -> NoReturn:
        """Refuse."""
        _refuse(adapter, "disable_adapter()")

    def merge(self, adapter: Any) -> NoReturn:
        """Refuse."""
        _refuse(adapter, "merge_adapter()")

    def unmerge(self, adapter: Any) -> NoReturn:
        """Refuse."""
        _refuse(adapter, "unmerge_adapter()")

    def remove(self, adapter: Any, merged: bool) -> NoReturn:
        """Refuse."""
        _refuse(adapter, "merge_and_unload()" if merged else "delete_adapter(name)")


def _refuse(adapter: Any, call: str) -> NoReturn:
    raise RuntimeError(f"PEFT holds the adapter {adapter.name!r}; call the PEFT model's {call}")
