"""Says where in a repository or folder an adapter or a model is, from the options of a command."""

from __future__ import annotations

from argparse import Namespace
from typing import TypedDict

from ..nn.door import HubPlace


class Places(TypedDict):
    """The arguments of functions that read several folders or repositories of the hub."""

    revision: list[str | None] | None
    token: str | None
    subfolder: list[str] | None


def place(options: Namespace) -> HubPlace:
    """Return what ``--revision``, ``--token`` and ``--subfolder`` say."""
    return HubPlace(revision=options.revision, token=options.token, subfolder=options.subfolder)


def places(options: Namespace) -> Places:
    """Return what these options say where each may be given once for each folder; '.' is the default."""
    revisions = options.revision and [None if each == "." else each for each in options.revision]
    return Places(revision=revisions, token=options.token, subfolder=options.subfolder)


def place_of_model(options: Namespace) -> HubPlace:
    """Return what ``--model-revision``, ``--token`` and ``--model-subfolder`` say."""
    return HubPlace(
        revision=options.model_revision, token=options.token, subfolder=options.model_subfolder
    )
