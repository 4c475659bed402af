"""lortalib: fine-tune a transformer through one low-rank tensor.

`lortalib.decomp` makes tensor networks; `lortalib.nn` puts them on a model; `lortalib.peft` is the same as
a method of PEFT; `lortalib.serve` serves a model with many adapters; `lortalib.plot` plots adapters and
networks; `lortalib.cli` is the command line. Each is loaded when it is first touched.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from ._peft_import import register_when_imported
from ._version import __version__

if TYPE_CHECKING:
    from . import cli, decomp, nn, peft, plot, serve

register_when_imported()

__all__ = ["__version__", "cli", "decomp", "nn", "peft", "plot", "serve"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_hint(name)}")
    return importlib.import_module(f".{name}", __name__)


def _hint(name: str) -> str:
    """Say which module of the library has a name; `peft` and `serve` are not loaded for this."""
    if name.startswith("_"):
        return ""
    loaded = [door for door in ("serve", "peft") if f"{__name__}.{door}" in sys.modules]
    paths = {each: each for each in __all__} | {
        own: f"{door}.{own}"
        for door in (*loaded, "decomp", "nn")
        for own in importlib.import_module(f".{door}", __name__).__all__
    }
    if name in paths:
        return f"; use lortalib.{paths[name]}"
    near = difflib.get_close_matches(name, paths, n=1)
    return f"; did you mean lortalib.{paths[near[0]]}?" if near else ""


def __dir__() -> list[str]:
    return [*globals(), *(name for name in __all__ if name not in globals())]
