"""The records of an adapter as JSON, and back, with every value checked."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ...decomp import Legs, Network
from .._adapter import AdapterConfig
from .._anatomy import FeatureRows, Site
from .._group import Group

Record = TypeVar("Record")


#: A group as it was saved, with its line and the sizes of its modes.
Saved = tuple[Group, Legs, dict[str, int]]


def group_to_json(group: Group, network: Network, shared: Mapping[str, str]) -> dict[str, Any]:
    """A group, its network's line and sizes, and which of its tensors another network stores."""
    return {
        "name": group.name,
        "legs": str(network.legs),
        "modes": dict(network.shape),
        "ranks": network.ranks,
        "layers": list(group.layers),
        "roles": list(group.roles),
        "sites": [asdict(site) for site in group.sites],
        "shared": dict(shared),
    }


def settings_from_json(entry: Any) -> AdapterConfig:
    """Settings, checked.

    Raises:
        ValueError: a value that is missing, of the wrong type or out of range.
    """
    settings = _record(AdapterConfig, entry)
    if not (math.isfinite(settings.alpha) and math.isfinite(settings.scaling)):
        raise ValueError("alpha or scaling is not finite")
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"dropout is {settings.dropout}")
    if settings.gqa not in ("pool", "split"):
        raise ValueError(f"gqa is {settings.gqa!r}")
    return settings


def group_from_json(entry: Any) -> Saved:
    """A group with its line and sizes, checked against each other.

    Raises:
        ValueError: a value that is missing or does not fit the others; `LegsError` is one.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"a group is {entry!r}")
    missing = {"name", "legs", "modes", "layers", "roles", "sites"} - set(entry)
    if missing:
        raise ValueError(f"a group lacks {', '.join(sorted(missing))}")
    name, line, modes = entry["name"], entry["legs"], entry["modes"]
    if not isinstance(name, str) or not name or "." in name or not isinstance(line, str):
        raise ValueError(f"a group is called {name!r} and has the legs {line!r}")
    if not isinstance(modes, dict) or not all(_fits(size, int) for size in modes.values()):
        raise ValueError(f"the modes of group {name!r} are {modes!r}")
    for key, kind in (("layers", int), ("roles", str), ("sites", dict)):
        listed = entry[key]
        if not isinstance(listed, list) or not listed or not all(_fits(x, kind) for x in listed):
            raise ValueError(f"the {key} of group {name!r} are {listed!r}")
    legs = Legs.parse(line)
    legs.check(tuple(modes))
    sites = tuple(_site(site) for site in entry["sites"])
    layers, roles = tuple(entry["layers"]), tuple(entry["roles"])
    if len({site.key for site in sites}) < len(sites):
        raise ValueError(f"a site stands twice in group {name!r}")
    if len(set(layers)) < len(layers) or len(set(roles)) < len(roles):
        raise ValueError(f"a layer or role stands twice in group {name!r}")
    group = Group(name, modes.get("head", 0), sites, layers, roles)
    for site in sites:
        if site.layer not in layers or site.role not in roles or group.heads % site.heads:
            raise ValueError(f"site {site.key} is outside its group {name!r}")
    if dict(group.shape) != modes:
        raise ValueError(f"the modes {modes} of group {name!r} do not fit its sites")
    return group, legs, modes


def shared_from_json(entry: Mapping[str, Any]) -> dict[str, str]:
    """Parameter names of a group's network that are stored as another tensor.

    Raises:
        ValueError: anything but names.
    """
    shared = entry.get("shared", {})
    if not isinstance(shared, dict) or not all(_fits(x, str) for x in shared.values()):
        raise ValueError(f"the shared tensors of a group are {shared!r}")
    return shared


def _site(entry: Mapping[str, Any]) -> Site:
    entry = dict(entry)
    if isinstance(entry.get("also"), list):
        entry["also"] = tuple(entry["also"])
    rows = entry.get("rows")
    if rows is not None:
        try:
            dims = tuple((int(size), int(stride)) for size, stride in rows["dims"])
            entry["rows"] = FeatureRows(int(rows["offset"]), dims)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"the rows of a site are {rows!r}") from error
    site = _record(Site, entry)
    sizes = site.heads, site.query_heads, site.head_dim, site.width
    if not site.role or "." in site.role or min(sizes) < 1 or site.experts < 0:
        raise ValueError(f"a site is {entry!r}")
    return site


def _record(cls: type[Record], entry: Any) -> Record:
    """A flat dataclass from a mapping: every field there, of its type, and none beside."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{cls.__name__} is {entry!r}")
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    if set(names) != set(entry):
        differ = ", ".join(sorted(set(names) ^ set(entry)))
        raise ValueError(f"{cls.__name__} has other fields than expected: {differ}")
    for name in names:
        if not _fits(entry[name], hints[name]):
            raise ValueError(f"{name} of {cls.__name__} is {entry[name]!r}")
    return cls(**entry)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a simple type; an integer is also a float, a truth value is neither."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(x, get_args(hint)[0]) for x in value)
    if hint is float:
        whole = _fits(value, int) and abs(value) <= sys.float_info.max
        return isinstance(value, float) or whole
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
