"""Adapters of several tasks: one tensor T[task, layer, ...], of which a row of a batch uses its slice."""

from .adapter import TaskAdapter
from .refuse import refuse_tasks

__all__ = ["TaskAdapter", "refuse_tasks"]
