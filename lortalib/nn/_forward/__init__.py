"""What runs in a forward. Knows no adapter, only the small protocols of ``update``."""

from .attach import Handle, attach, detach
from .hooks import UpdateHook, by_module, watch_forwards
from .pairs import Pair, PairSource
from .scope import ForwardScope
from .update import ModuleUpdate, OutputHook, Slot, add_update, may_write_output, slots_of

__all__ = [
    "ForwardScope",
    "Handle",
    "ModuleUpdate",
    "OutputHook",
    "Pair",
    "PairSource",
    "Slot",
    "UpdateHook",
    "add_update",
    "attach",
    "by_module",
    "detach",
    "may_write_output",
    "slots_of",
    "watch_forwards",
]
