"""Reads the adapters that are compressed, as low-rank pairs under the names that they keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from os import PathLike
from pathlib import Path
from typing import Union

from torch import nn

from ..._kinds import PATH, Kind, are, is_writable
from .._files import Lora, Rules, read_pairs
from .._hub import each_place

#: A folder; several, which are named after themselves; or a mapping from names to folders.
Folders = Union[
    str, "PathLike[str]", Iterable[Union[str, "PathLike[str]"]], Mapping[str, "str | PathLike[str]"]
]


#: The kind of an argument that gives folders.
FOLDERS = Kind(
    "a path, a list of paths, or a mapping from names to paths",
    lambda value: (
        PATH.fits(value) or are(PATH.fits)(value.values() if isinstance(value, Mapping) else value)
    ),
)


def read_sources(
    model: nn.Module,
    folders: Folders,
    rules: Rules,
    revision: str | Sequence[str | None] | None = None,
    token: str | bool | None = None,
    subfolder: str | Sequence[str | None] | None = None,
) -> dict[str, Lora]:
    """Read saved adapters by their names.

    Args:
        model: the model that they were trained on.
        folders: as for `compress`.
        rules: as for `compress`.
        revision, token, subfolder: as for `compress`.

    Raises:
        ValueError: no folder, two of one name, or an impossible name.
        FileNotFoundError, AdapterFileError: as for `read_pairs`.
    """
    if not isinstance(folders, Mapping):
        folders = [folders] if isinstance(folders, (str, PathLike)) else list(folders)
    places = each_place(len(folders), revision, token, subfolder)
    within = [place["subfolder"] for place in places]
    named = _named(folders, within if len(set(within)) > 1 else [])
    return {
        name: read_pairs(model, folder, rules, **place)
        for (name, folder), place in zip(named.items(), places)
    }


def _named(
    folders: Sequence[str | PathLike[str]] | Mapping[str, str | PathLike[str]],
    within: Sequence[str | None],
) -> dict[str, str | PathLike[str]]:
    """Name the folders, after themselves or after subfolders that differ."""
    if isinstance(folders, Mapping):
        named = dict(folders)
    else:
        named = {}
        for folder, inside in zip_longest(folders, within):
            name = _name_of(Path(folder, inside or "."))
            if name in named:
                raise ValueError(
                    f"{named[name]} and {folder} are both called {name!r}; give names, as in "
                    f'{{"one": {str(named[name])!r}, "two": {str(folder)!r}}}'
                )
            named[name] = folder
    if not named:
        raise ValueError("there is nothing to compress: give at least one folder")
    for name in named:
        if (
            not isinstance(name, str)
            or not name
            or set(name) & set("./\\")
            or not is_writable(name)
        ):
            raise ValueError(
                f"the name of an adapter, which becomes that of its folder, is a non-empty string without "
                f"dots and slashes; found {name!r}"
            )
    return named


def _name_of(folder: Path) -> str:
    """Name an adapter after its folder; an adapter's name has no dots."""
    folder = folder.resolve()
    return (folder.parent if folder.is_file() else folder).name.replace(".", "_")
