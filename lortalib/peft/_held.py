"""Defines the host of adapters on a PEFT model, which refuses the calls that PEFT has its own calls for."""

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
        """Return the base's weight of a site, without any merged update."""
        layer = self.model.get_submodule(site.path)
        assert isinstance(layer, LortaLayer)
        return layer.unmerged_weight

    def changed_base(self) -> list[str]:
        """Return nothing: PEFT's files are PEFT's to check."""
        return []

    def bring_back(self, adapter: Any) -> None:
        """Bring the modules that PEFT trains with an adapter back from accelerate's offloading."""
        paths = [
            f"{path}.modules_to_save.{adapter.name}"
            for path, module in self.model.named_modules()
            if isinstance(module, ModulesToSaveWrapper) and adapter.name in module.modules_to_save
        ]
        adapter.trained_modules.bring_back(self.model, paths)

    def places(self, adapter: Any) -> None:
        """Return nothing: a layer of PEFT that was replaced is gone with its adapters."""

    def prepare_files(self, adapter: Any) -> NoReturn:
        """Refuse to write a file, because PEFT may train modules that only its own files contain."""
        _refuse(adapter, "save_pretrained(folder), or base_model.export_lora(folder)")

    def enable(self, adapter: Any) -> NoReturn:
        """Refuse to switch the adapter on; PEFT's ``set_adapter`` does that."""
        _refuse(adapter, "set_adapter(name)")

    def disable(self, adapter: Any) -> NoReturn:
        """Refuse to switch the adapter off; PEFT's ``disable_adapter`` does that."""
        _refuse(adapter, "disable_adapter()")

    def disabled(self, adapter: Any) -> NoReturn:
        """Refuse to switch the adapter off; PEFT's ``disable_adapter`` does that."""
        _refuse(adapter, "disable_adapter()")

    def merge(self, adapter: Any) -> NoReturn:
        """Refuse to merge the adapter; PEFT's ``merge_adapter`` does that."""
        _refuse(adapter, "merge_adapter()")

    def unmerge(self, adapter: Any) -> NoReturn:
        """Refuse to unmerge the adapter; PEFT's ``unmerge_adapter`` does that."""
        _refuse(adapter, "unmerge_adapter()")

    def remove(self, adapter: Any, merged: bool) -> NoReturn:
        """Refuse to remove the adapter; PEFT's ``delete_adapter`` or ``merge_and_unload`` does that."""
        _refuse(adapter, "merge_and_unload()" if merged else "delete_adapter(name)")


def _refuse(adapter: Any, call: str) -> NoReturn:
    raise RuntimeError(f"PEFT holds the adapter {adapter.name!r}; call the PEFT model's {call}")
