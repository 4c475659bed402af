"""Runs a model to check a plan of sites, or the effect of an adapter."""

from .effect import check_effect
from .report import Report, verify

__all__ = ["Report", "check_effect", "verify"]
