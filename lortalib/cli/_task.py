"""Checks the option that names one task of an adapter."""

from __future__ import annotations

from collections.abc import Sequence


def check_task(folder: str, tasks: Sequence[str], task: str | None, option: str = "--task") -> None:
    """Refuse an adapter of several tasks of which none is named, and a name that is none of its tasks.

    Args:
        folder: the folder of the adapter, for the message.
        tasks: the names of its tasks; empty for an ordinary adapter.
        task: the task that the user names; None without the option.
        option: how the option is called.

    Raises:
        ValueError: one is missing, unknown or superfluous.
    """
    if task is None and tasks:
        raise ValueError(
            f"the adapter in {folder} has the tasks {', '.join(tasks)}, and this takes one: give {option}, "
            f"as in {option} {tasks[0]}"
        )
    if task is not None and not tasks:
        raise ValueError(f"the adapter in {folder} has no tasks; leave out {option} {task}")
    if task is not None and task not in tasks:
        raise ValueError(
            f"the adapter in {folder} has no task {task!r}; choose one of {', '.join(tasks)}"
        )
