"""Adapters on transformers models: one low-rank tensor for all attention projections."""

from ._adapter import Adapter, AdapterConfig
from ._align import align_to_gradient
from ._anatomy import BlockRule, FeatureRows, Site, UnsupportedModelError, mlp_sites, sites
from ._apply import apply
from ._files import AdapterFileError, export_lora, load, load_lora
from ._group import Group
from ._host import adapters, set_active
from ._plan import Plan, plan
from ._verify import Report, check_effect, verify

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterFileError",
    "BlockRule",
    "FeatureRows",
    "Group",
    "Plan",
    "Report",
    "Site",
    "UnsupportedModelError",
    "adapters",
    "align_to_gradient",
    "apply",
    "check_effect",
    "export_lora",
    "load",
    "load_lora",
    "mlp_sites",
    "plan",
    "set_active",
    "sites",
    "verify",
]
