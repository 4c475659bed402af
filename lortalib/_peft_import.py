"""Registers the method with PEFT right behind an import of PEFT, and costs nothing where there is none."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_when_imported() -> None:
    """Import `lortalib.peft` now if PEFT is there already, else right behind PEFT."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    try:
        importlib.import_module("lortalib.peft")
    except Exception as error:  # an import of PEFT must not fail because of lortalib
        warnings.warn(
            f"lortalib could not register its method with the installed PEFT ({error}); it needs "
            "peft 0.21 or later",
            stacklevel=2,
        )


class _Watch(MetaPathFinder):
    """A finder of modules that finds none itself: it sees PEFT being imported, and then steps aside."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of PEFT with a loader that registers the method behind it.

        Being asked does not mean that PEFT is imported: transformers only looks whether it is
        there. So the watch ends when the module is executed.
        """
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
