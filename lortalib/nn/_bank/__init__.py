"""Many adapters of one shape on one model."""

from .bank import Bank, bank

__all__ = ["Bank", "bank"]
