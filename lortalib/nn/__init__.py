"""Adapters on transformers models: one low-rank tensor for all attention projections."""

from ._acts import check_effect
from ._adapter import Adapter, AdapterConfig
from ._align import align_to_gradient
from ._anatomy import UnsupportedModelError, mlp_sites, sites
from ._apply import adapters, apply, set_active
from ._bank import Bank, bank
from ._families import BlockRule
from ._from_lora import load_lora
from ._groups import Group
from ._lora import export_lora
from ._probe import Report, verify
from ._site import FeatureRows, Site
from ._storage import AdapterFileError, load

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterFileError",
    "Bank",
    "BlockRule",
    "FeatureRows",
    "Group",
    "Report",
    "Site",
    "UnsupportedModelError",
    "adapters",
    "align_to_gradient",
    "apply",
    "bank",
    "check_effect",
    "export_lora",
    "load",
    "load_lora",
    "mlp_sites",
    "set_active",
    "sites",
    "verify",
]
