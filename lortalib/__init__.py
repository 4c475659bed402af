"""lortalib: fine-tune a transformer through one low-rank tensor.

`lortalib.decomp` makes tensor networks; `lortalib.nn` puts them on a model; `lortalib.peft` is the same as
a method of PEFT; `lortalib.plot` plots both; `lortalib.cli` is the command line. Each is loaded
when it is first touched.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from ._peft_import import register_when_imported
from ._version import __version__

if TYPE_CHECKING:
    from . import cli, decomp, nn, peft, plot

register_when_imported()

__all__ = ["__version__", "cli", "decomp", "nn", "peft", "plot"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return [*globals(), *(name for name in __all__ if name not in globals())]
