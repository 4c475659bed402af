"""Adds options that several commands have in common."""

from __future__ import annotations

import argparse

from ._texts import text


def add_place(sub: argparse.ArgumentParser) -> None:
    """Add the options that say where in a repository or folder the adapter is."""
    sub.add_argument(
        "--revision",
        metavar="REV",
        help="branch, tag or commit of FOLDER on the hub (default: main)",
    )
    sub.add_argument(
        "--subfolder",
        metavar="PATH",
        help="folder in the repository, or below FOLDER, that has the adapter (default: its top)",
    )


def add_task(sub: argparse.ArgumentParser, option: str = "--task", of: str = "the adapter") -> None:
    """Add the option that names one task.

    Args:
        sub: the parser of the command.
        option: the name of the option.
        of: the adapter, for the help text.
    """
    sub.add_argument(
        option,
        type=text,
        metavar="NAME",
        help=f"the task of {of}, if it has several (default: none)",
    )


def add_subfolders(sub: argparse.ArgumentParser, each: str) -> None:
    """Add the option that names a folder in each of several repositories.

    Args:
        sub: the parser of the command.
        each: what the repositories are called in the usage.
    """
    sub.add_argument(
        "--subfolder",
        metavar="PATH",
        action="append",
        help=f"folder in each repository or folder that has the adapter; give it once, or once for each of "
        f"{each}, where '.' is the top (default: the top)",
    )


def add_trust(sub: argparse.ArgumentParser, of: str = "MODEL") -> None:
    """Add the option that allows code of a model.

    Args:
        sub: the parser of the command.
        of: the model, for the help text.
    """
    sub.add_argument(
        "--trust-remote-code",
        action="store_true",
        help=f"run Python code that comes with {of} (default: no)",
    )
