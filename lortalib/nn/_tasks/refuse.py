"""Refuses adapters of several tasks where the networks of one task cannot be changed alone."""

from __future__ import annotations

from .._adapter import Adapter
from .adapter import TaskAdapter


def refuse_tasks(adapter: Adapter, purpose: str) -> None:
    """Refuse an adapter of several tasks where the networks of one task cannot be changed alone.

    Args:
        adapter: any adapter.
        purpose: what the caller would do to it, for the message.

    Raises:
        ValueError: the adapter has tasks.
    """
    if isinstance(adapter, TaskAdapter):
        raise ValueError(
            f"adapter {adapter.name!r} has the tasks {', '.join(map(repr, adapter.tasks))}, which have "
            f"parameters in common: {purpose} would change one task and break the others. Save "
            "adapter.task(name) and load it, which is an ordinary adapter"
        )
