"""Runs the updates in a forward. This package knows adapters only by the protocols in ``update``."""

from .attach import Handle, attach, detach
from .hooks import Update, UpdateHook, by_module, put_hook, watch_forwards
from .module_sites import Pair
from .pairs import PairSource
from .places import Places
from .rows import EvenRows, RowMaps, TokenRows
from .scope import ForwardScope
from .update import (
    ModuleUpdate,
    OutputHook,
    Place,
    Slot,
    add_update,
    may_write_output,
    place_of,
    slots_of,
    without_bias,
)

__all__ = [
    "EvenRows",
    "ForwardScope",
    "Handle",
    "ModuleUpdate",
    "OutputHook",
    "Pair",
    "PairSource",
    "Place",
    "Places",
    "RowMaps",
    "Slot",
    "TokenRows",
    "Update",
    "UpdateHook",
    "add_update",
    "attach",
    "by_module",
    "detach",
    "may_write_output",
    "place_of",
    "put_hook",
    "slots_of",
    "watch_forwards",
    "without_bias",
]
