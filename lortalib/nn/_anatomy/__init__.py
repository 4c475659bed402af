"""Finds the sites of a model and describes them as data; changes nothing in the model."""

from .linear import linear_sites
from .mlp import check_experts
from .names import ATTRIBUTE
from .rules import BlockRule
from .site import MLP_ROLES, ROLES, FeatureRows, Site
from .sites import (
    NoAttentionError,
    UnsupportedModelError,
    check_model,
    mlp_sites,
    sites,
    understood_sites,
)
from .stacks import SiteList
from .weights import (
    as_stored,
    check_stored,
    is_conv1d,
    is_projection,
    original_parameters,
    original_weight,
    site_weight,
    through_weight,
)
from .wrappers import module_at, named_modules, plain_name, unwrapped, wrappers

__all__ = [
    "ATTRIBUTE",
    "MLP_ROLES",
    "ROLES",
    "BlockRule",
    "FeatureRows",
    "NoAttentionError",
    "Site",
    "SiteList",
    "UnsupportedModelError",
    "as_stored",
    "check_experts",
    "check_model",
    "check_stored",
    "is_conv1d",
    "is_projection",
    "linear_sites",
    "mlp_sites",
    "module_at",
    "named_modules",
    "original_parameters",
    "original_weight",
    "plain_name",
    "site_weight",
    "sites",
    "through_weight",
    "understood_sites",
    "unwrapped",
    "wrappers",
]
