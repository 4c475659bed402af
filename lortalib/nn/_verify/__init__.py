"""Runs a model to check a plan or an adapter."""

from .effect import check_effect
from .report import Report, verify

__all__ = ["Report", "check_effect", "verify"]
