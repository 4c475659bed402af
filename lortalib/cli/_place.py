"""Says where in a repository or folder an adapter is, from the options of a command."""

from __future__ import annotations

from argparse import Namespace
from typing import TypedDict


class Place(TypedDict):
    """The arguments of the functions of `lortalib.nn` that read an adapter."""

    revision: str | None
    subfolder: str | None


def place(options: Namespace) -> Place:
    """Return what ``--revision`` and ``--subfolder`` say."""
    return Place(revision=options.revision, subfolder=options.subfolder)
