"""Declares what the file of an adapter says of it: the fields of format version 2."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property

from ...decomp import Legs
from .._anatomy import Site
from .._config import AdapterConfig
from .._group import Group

FORMAT = "lortalib adapter"
FORMAT_VERSION = 2

#: Bounds far beyond any adapter, so that a stranger's file costs neither time nor memory.
MOST_PARAMETERS = 64
MOST_LEGS = 52
LONGEST_LINE = 10_000

_PREFIX = "trained_modules."


@dataclass(frozen=True)
class SavedGroup:
    """One group as its file describes it.

    Attributes:
        name: of the group and its network.
        legs: the line of its network.
        modes: size of each mode, in the order of the axes.
        ranks: size of each bond.
        parameters: name of each parameter of the line, in its order.
        layers: layer of the model for each position of the mode ``layer``.
        roles: role for each position of the mode ``matrix``.
        sites: the projections.
        shared: for a parameter that another network has too, the tensor of the file that it is.
    """

    name: str
    legs: str
    modes: dict[str, int]
    ranks: dict[str, int]
    parameters: tuple[str, ...]
    layers: tuple[int, ...]
    roles: tuple[str, ...]
    sites: tuple[Site, ...]
    shared: dict[str, str]

    @cached_property
    def line(self) -> Legs:
        """The line, read."""
        return parse_line(self.legs)

    @property
    def group(self) -> Group:
        """The group, with the sites as they were saved."""
        on_stream, heads = "head" not in self.modes, self.modes.get("head", 1)
        return Group(self.name, heads, self.sites, self.layers, self.roles, on_stream)

    def keys_in_file(self) -> list[str]:
        """The tensor of the file that each parameter of the line is."""
        return [self.shared.get(own, self.key_of(own)) for own in self.parameters]

    def key_of(self, own: str) -> str:
        """The tensor of the file that would be a parameter of this network alone."""
        return f"networks.{self.name}.{own}"

    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each parameter of the line."""
        sizes = {**self.modes, **self.ranks}
        return [tuple(sizes[leg] for leg in term.legs) for term in self.line.terms]


@dataclass(frozen=True)
class Description:
    """What the file of an adapter says of it.

    Attributes:
        format: `FORMAT`.
        format_version: `FORMAT_VERSION`.
        lortalib_version: of the library that wrote it.
        name: of the adapter.
        config: how it was asked for.
        trained_modules: paths of the modules that trained as a whole.
        base_model: class, model_type, name of the model, and shape_fingerprint of the sites.
        groups: which sites share which network.
        shared_weights: for each trained module, the weights of other modules of the model that are the
            very same tensor; None where that is not known.
    """

    format: str
    format_version: int
    lortalib_version: str
    name: str
    config: AdapterConfig
    trained_modules: tuple[str, ...]
    base_model: dict[str, str | None]
    groups: tuple[SavedGroup, ...]
    shared_weights: dict[str, tuple[str, ...]] | None = None

    def text(self) -> str:
        """The description as it stands in the file."""
        return json.dumps(asdict(self), allow_nan=False)

    def sites(self) -> Iterable[Site]:
        """Every projection that is updated."""
        return (site for group in self.groups for site in group.sites)


def parse_line(text: str) -> Legs:
    """Read a stranger's line of legs, bounded first.

    Raises:
        ValueError: too long, too many parameters or legs; `LegsError`, no line.
    """
    if len(text) > LONGEST_LINE or text.count(",") >= MOST_PARAMETERS:
        raise ValueError(
            f"a line of {len(text):,} characters and {text.count(',') + 1:,} parameters; at most "
            f"{LONGEST_LINE:,} and {MOST_PARAMETERS} are read"
        )
    legs = set(re.sub(r"\([^()]*\)", " ", text).replace(",", " ").split())
    if len(legs) > MOST_LEGS:
        raise ValueError(f"a line of {len(legs)} different legs; at most {MOST_LEGS} are read")
    return Legs.parse(text)


def trained_key(path: str, name: str) -> str:
    """The tensor of the file that is one value of a trained module."""
    return f"{_PREFIX}{path}:{name}"


def values_of(description: Description, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each trained module, the tensors of the file that are its values, by their name in it.

    Args:
        description: of the file.
        names: of all tensors of the file.
    """
    found: dict[str, dict[str, str]] = {path: {} for path in description.trained_modules}
    for name in names:
        path, colon, own = name.removeprefix(_PREFIX).partition(":")
        if name.startswith(_PREFIX) and colon and path in found:
            found[path][own] = name
    return found
