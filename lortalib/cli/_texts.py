"""Reads the texts that stand for arguments; argparse prints the reason why one is refused."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

import torch


def text(given: str) -> str:
    """Read a name or a path, which an empty text is not: as a path it would be the current folder."""
    if not given.strip():
        raise ArgumentTypeError("a name or a path is needed; found an empty text")
    return given


def folder(given: str) -> str:
    """Read the path of a folder that is to be written, which no file may stand in the way of."""
    path = Path(text(given))
    for each in (path, *path.parents):
        if each.exists() and not each.is_dir():
            raise ArgumentTypeError(f"a folder is needed; {each} is a file. Give another path")
    return given


def _integer(given: str) -> int:
    try:
        return int(given.replace(",", "").replace("_", ""))
    except ValueError:
        raise ArgumentTypeError(f"an integer is needed; found {given!r}") from None


def count(given: str) -> int:
    """Read a number of at least 1."""
    found = _integer(given)
    if found < 1:
        raise ArgumentTypeError(f"an integer of at least 1 is needed; found {given}")
    return found


def number(given: str) -> int:
    """Read a number of parameters, such as ``50,000``."""
    found = _integer(given)
    if found < 1:
        raise ArgumentTypeError(f"a budget is at least 1 parameter; found {given}")
    return found


def port(given: str) -> int:
    """Read the number of a port; 0 is any that is free."""
    found = _integer(given)
    if not 0 <= found < 2**16:
        raise ArgumentTypeError(f"a port is an integer from 0 to 65535; found {given}")
    return found


def named_folder(given: str) -> tuple[str, str]:
    """Read a name and a folder with ``=`` between them."""
    name, _, place = given.partition("=")
    if not name.strip() or not place.strip():
        raise ArgumentTypeError(
            f"a name and a folder are needed, as in ann=my-adapter; found {given!r}. MODEL goes first"
        )
    return name, place


def device(given: str) -> str:
    """Read the name of a device that torch has here."""
    try:
        torch.empty(0, device=text(given))
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise ArgumentTypeError(
            f"a device of torch is needed, such as cpu or cuda:0; found {given!r} ({why})"
        ) from error
    return given


def tolerance(given: str) -> float:
    """Read a relative difference."""
    try:
        found = float(given)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise ArgumentTypeError(f"a number of at least 0 is needed, such as 1e-4; found {given!r}")
    return found


def ranks(given: str) -> list[int]:
    """Read ranks with commas between them."""
    return [count(each) for each in _parts(given, "a rank, such as 8 or 1,4,16")]


def names(given: str) -> list[str]:
    """Split names with commas between them; a line of legs, which has blanks, stays whole."""
    return [given] if " " in given.strip() else _parts(given, "a name")


def _parts(given: str, what: str) -> list[str]:
    found = [each for each in given.split(",") if each.strip()]
    if not found:
        raise ArgumentTypeError(f"{what} is needed; found {given!r}")
    return found


def targets(given: str) -> str | Sequence[str]:
    """Split names with commas between them to a list; return a regular expression unchanged."""
    plain = all(each.isidentifier() for each in given.replace(",", ".").split("."))
    return given.split(",") if "," in given and plain else text(given)
