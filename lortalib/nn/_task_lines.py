"""Reads the names of tasks, and what a line of legs is for one task alone."""

from __future__ import annotations

from collections.abc import Iterable

from .._kinds import TEXT
from ..decomp import Legs, LegsError

#: The mode whose positions are the tasks.
TASK = "task"


def check_task_names(tasks: object) -> tuple[str, ...]:
    """Read the names of tasks.

    Args:
        tasks: a list or tuple of names; each is a text without dots, since it is a part of the names of
            parameters.

    Raises:
        ValueError: no list of names, an impossible name, or one that stands twice.

    Example:
        >>> check_task_names(["sst2", "mrpc"])
        ('sst2', 'mrpc')
    """
    if not isinstance(tasks, (list, tuple)):
        raise ValueError(f"tasks must list names, such as ['sst2', 'mrpc']; found {tasks!r}")
    for name in tasks:
        # `add_task(name, start="mean")` takes the name of a task or this word.
        if not TEXT.fits(name) or not name or "." in name or name == "mean":
            raise ValueError(
                f"the name of a task is a non-empty text without dots, and not 'mean'; found {name!r}"
            )
    if len(set(tasks)) < len(tasks):
        twice = next(name for name in tasks if tasks.count(name) > 1)
        raise ValueError(f"the names of tasks differ; {twice!r} stands twice in {list(tasks)}")
    return tuple(tasks)


def check_dropout(dropout: float) -> None:
    """Refuse dropout, which an adapter with tasks cannot have.

    Raises:
        ValueError: the probability is not zero.
    """
    if dropout:
        raise ValueError(
            "an adapter with tasks has no dropout, since each row of a batch can have maps of its own; found "
            f"dropout={dropout:g}"
        )


def has_tasks(legs: Legs) -> bool:
    """Return True if parameters of a line carry the mode ``task``, or a factor of it."""
    return any(leg in legs.carriers for leg in legs.open_legs([TASK]))


def line_of_one_task(legs: Legs) -> Legs:
    """Write the line of one task: the line of all tasks without the leg ``task``.

    Args:
        legs: the line of the tensor of all tasks.

    Raises:
        LegsError: a parameter of which a task has no part that could be a tensor of its own.

    Example:
        >>> str(line_of_one_task(Legs.parse("in a, layer a b, task b c, out c")))
        'in a, layer a b, b c, out c'
    """
    line = legs.line or str(legs)
    if legs.open_legs([TASK]) != (TASK,):
        raise LegsError(
            "the mode 'task' is split, but its positions are names; leave it whole, in", line
        )
    terms = legs.terms
    for k, term in enumerate(terms):
        owner = terms[legs.owners[k]]
        if term.of and TASK in term.legs:
            raise LegsError(
                f"({term}) carries 'task' and is hashed, so all tasks would have the numbers of one vector; "
                "let it have numbers of its own, in",
                line,
            )
        if term.legs == (TASK,):
            raise LegsError(
                "a parameter that carries 'task' alone is one number for each task; give it a bond, as in "
                "'task r', in",
                line,
            )
        if _place(term.legs) != _place(owner.legs):
            raise LegsError(
                f"({term}) is tied to ({owner}), and only one carries 'task', or elsewhere among its legs; "
                "put it at the same place of both, in",
                line,
            )
    return Legs(tuple(t.without([TASK]) for t in terms))


def are_common(legs: Legs) -> tuple[bool, ...]:
    """Tell for each term of the line of all tasks whether the tasks have its parameter in common.

    Args:
        legs: the line of the tensor of all tasks.

    Example:
        >>> are_common(Legs.parse("in a, layer a b, task b c, out c"))
        (True, True, False, True)
    """
    return tuple(TASK not in term.legs for term in legs.terms)


def _place(legs: Iterable[str]) -> int:
    """Return the position of the leg ``task``; -1 without it."""
    found = tuple(legs)
    return found.index(TASK) if TASK in found else -1
