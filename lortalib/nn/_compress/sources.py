"""Reads the adapters that are compressed, as low-rank pairs under the names that they keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Union

from torch import nn

from ..._kinds import PATH, Kind, are, is_writable
from .._files import Lora, Rules, read_pairs

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


def read_sources(model: nn.Module, folders: Folders, rules: Rules) -> dict[str, Lora]:
    """Read saved adapters by their names.

    Args:
        model: the model that they were trained on.
        folders: as for `compress`.
        rules: as for `compress`.

    Raises:
        ValueError: no folder, two of one name, or an impossible name.
        FileNotFoundError, AdapterFileError: as for `read_pairs`.
    """
    return {name: read_pairs(model, folder, rules) for name, folder in _named(folders).items()}


def _named(folders: Folders) -> dict[str, str | PathLike[str]]:
    if isinstance(folders, Mapping):
        named = dict(folders)
    else:
        listed = [folders] if isinstance(folders, (str, PathLike)) else list(folders)
        named = {}
        for folder in listed:
            name = _name_of(Path(folder))
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
