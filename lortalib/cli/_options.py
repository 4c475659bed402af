"""Adds options that several commands have in common."""

from __future__ import annotations

import argparse

from ._models import DTYPES
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
    add_token(sub)


def add_token(sub: argparse.ArgumentParser) -> None:
    """Add the option for a token of the hub."""
    sub.add_argument(
        "--token",
        type=text,
        metavar="TOKEN",
        help="token of the hub; other users of this machine may see it in the list of processes "
        "(default: HF_TOKEN, or what `hf auth login` stored)",
    )


def add_model_place(
    sub: argparse.ArgumentParser, prefix: str = "model-", of: str = "MODEL"
) -> None:
    """Add the options that say where in a repository or folder the model is.

    Args:
        sub: the parser of the command.
        prefix: how the names of the options begin; empty where the command reads a model alone.
        of: the model, for the help text.
    """
    sub.add_argument(
        f"--{prefix}revision",
        dest="model_revision",
        metavar="REV",
        help=f"branch, tag or commit of {of} on the hub (default: main)",
    )
    sub.add_argument(
        f"--{prefix}subfolder",
        dest="model_subfolder",
        metavar="PATH",
        help=f"folder in the repository or folder of {of} that has the model (default: its top)",
    )
    if not prefix:
        add_token(sub)


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


def add_places(sub: argparse.ArgumentParser, each: str) -> None:
    """Add the options that say where in each of several repositories or folders the adapter is.

    Args:
        sub: the parser of the command.
        each: what the repositories are called in the usage.
    """
    sub.add_argument(
        "--revision",
        metavar="REV",
        action="append",
        help=f"branch, tag or commit on the hub; give it once, or once for each of {each}, where '.' is the "
        "default and stands for local folders (default: main)",
    )
    sub.add_argument(
        "--subfolder",
        metavar="PATH",
        action="append",
        help=f"folder in each repository or folder that has the adapter; give it once, or once for each of "
        f"{each}, where '.' is the top (default: the top)",
    )
    add_token(sub)


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


def add_dtype(sub: argparse.ArgumentParser, default: str) -> None:
    """Add the option for the dtype of the model.

    Args:
        sub: the parser of the command.
        default: one of `DTYPES`, or "auto" for the dtype of the stored weights.
    """
    told = "as they are stored" if default == "auto" else default
    sub.add_argument(
        "--dtype",
        default=default,
        metavar="TYPE",
        help=f"dtype of the weights: {', '.join(DTYPES)} (default: {told})",
    )
