"""Upgrades the description of an older format version to the present version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .records import short
from .schema import FORMAT_VERSION, parse_line

Entry = TypeVar("Entry")
Parts = tuple[dict[str, Any], dict[str, Entry]]


class NewerFormatError(ValueError):
    """Raised for a file of a newer format version than this library knows."""


def upgrade(description: dict[str, Any], tensors: Mapping[str, Entry]) -> Parts[Entry]:
    """Upgrade a description to the present version, and rename the tensors to their present names.

    Args:
        description: the description in a file, unchecked except for its ``format``.
        tensors: a mapping whose keys are the names of the file's tensors.

    Raises:
        NewerFormatError: a newer version.
        ValueError: an unknown version, or a damaged description.

    Example:
        >>> old = {"format_version": 1, "settings": {"alpha": 1.0}}
        >>> upgrade(old, {"beside.lm_head:weight": 0})  # doctest: +NORMALIZE_WHITESPACE
        ({'format_version': 2, 'config': {'alpha': 1.0}},
         {'trained_modules.lm_head:weight': 0})
    """
    version = description.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(
            f"its format version is {short(version)}; versions 1 to {FORMAT_VERSION} are known"
        )
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"was written by a newer lortalib (format {short(version)}); update lortalib"
        )
    found = description, dict(tensors)
    while version < FORMAT_VERSION:
        found = UPGRADES[version](*found)
        version += 1
    return {**found[0], "format_version": version}, found[1]


def upgrade_1_to_2(
    description: dict[str, Any], tensors: dict[str, Entry]
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Upgrade version 1, which kept its description in ``adapter.json`` and used other names.

    Args:
        description: a description of version 1.
        tensors: a mapping whose keys are the names of the file's tensors.

    Raises:
        ValueError: a line of legs that cannot be read.
    """
    description = _renamed(description, {"settings": "config", "trained_beside": "trained_modules"})
    groups = description.get("groups")
    if isinstance(groups, list):
        known: dict[str, set[str]] = {}
        for key in tensors:
            _, _, rest = key.partition("networks.")
            group, _, name = rest.partition(".")
            known.setdefault(group, set()).add(name)
        description["groups"] = [_upgrade_group(group, known) for group in groups]
    start = "beside."
    return description, {
        f"trained_modules.{key[len(start) :]}" if key.startswith(start) else key: value
        for key, value in tensors.items()
    }


def _upgrade_group(group: Any, known: Mapping[str, set[str]]) -> Any:
    if not isinstance(group, dict):
        return group
    group = {"shared": {}, **group}
    if isinstance(group.get("sites"), list):
        names = {"also": "tied_paths", "bypassed": "weight_read_directly"}
        group["sites"] = [_renamed(site, names) for site in group["sites"]]
    if isinstance(group.get("legs"), str) and isinstance(group["shared"], dict):
        own = {*group["shared"], *known.get(str(group.get("name")), ())}
        group["parameters"] = _parameter_names(group["legs"], own)
    return group


def _parameter_names(line: str, known: set[str]) -> list[str]:
    """Name the parameters of a line: their legs, followed by ``_`` if the name is taken."""
    names: list[str] = []
    for term in parse_line(line).terms:
        name = "_".join(term.legs)
        free = (name + "_" * k for k in range(len(names) + 8) if name + "_" * k not in names)
        names.append(next((each for each in free if each in known), name))
    return names


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Rename the keys of a JSON object; return any other value as it is."""
    if not isinstance(value, dict):
        return value
    return {names.get(key, key): each for key, each in value.items()}


#: For each older version, the function that upgrades a description and its tensors to the next one.
UPGRADES: dict[int, Callable[..., Any]] = {1: upgrade_1_to_2}
