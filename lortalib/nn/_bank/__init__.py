"""Stores many adapters of one shape on one model, so that every row of a batch can use its own."""

from .bank import Bank
from .make import bank

__all__ = ["Bank", "bank"]
