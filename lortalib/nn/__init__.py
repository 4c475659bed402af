"""Adapters on transformers models: one low-rank tensor for all attention projections."""

from ._acts import acts
from ._adapter import Adapter, Settings
from ._align import align
from ._anatomy import AnatomyError, mlp_sites, sites
from ._apply import activate, adapters, apply
from ._bank import Bank, bank
from ._families import Family
from ._from_lora import from_lora
from ._groups import Group
from ._lora import export_lora
from ._probe import Report, verify
from ._site import Rows, Site
from ._storage import AdapterFileError, load

__all__ = [
    "Adapter",
    "AdapterFileError",
    "AnatomyError",
    "Bank",
    "Family",
    "Group",
    "Report",
    "Rows",
    "Settings",
    "Site",
    "activate",
    "acts",
    "adapters",
    "align",
    "apply",
    "bank",
    "export_lora",
    "from_lora",
    "load",
    "mlp_sites",
    "sites",
    "verify",
]
