"""Adapters on transformers models: one low-rank tensor for all attention projections."""

from ._adapter import Adapter, Settings
from ._anatomy import AnatomyError, Site, sites
from ._apply import activate, adapters, apply
from ._groups import Group
from ._storage import AdapterFileError, load

__all__ = [
    "Adapter",
    "AdapterFileError",
    "AnatomyError",
    "Group",
    "Settings",
    "Site",
    "activate",
    "adapters",
    "apply",
    "load",
    "sites",
]
