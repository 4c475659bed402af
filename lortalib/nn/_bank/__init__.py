"""Many adapters of one shape on one model, a different one for every row of a batch."""

from .bank import Bank
from .make import bank

__all__ = ["Bank", "bank"]
