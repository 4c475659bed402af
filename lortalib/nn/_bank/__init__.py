"""Stores many adapters of one shape on one model, so that every row of a batch can use its own."""

from .bank import Bank
from .batch import BatchTensors, CurrentBatch, row_pairs
from .chosen import Chosen, Names, read_names
from .hooks import attach_rows, check_rows
from .make import bank, bank_like

__all__ = [
    "Bank",
    "BatchTensors",
    "Chosen",
    "CurrentBatch",
    "Names",
    "attach_rows",
    "bank",
    "bank_like",
    "check_rows",
    "read_names",
    "row_pairs",
]
