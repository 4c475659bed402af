"""Declares the description of an adapter in its file: the fields of format version 2."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property

from ...decomp import Legs, Shape
from .._anatomy import Site
from .._config import AdapterConfig
from .._group import Group

FORMAT = "lortalib adapter"
FORMAT_VERSION = 2

#: Limits far above any real adapter, so that an untrusted file cannot use up time or memory.
MOST_PARAMETERS = 64
MOST_LEGS = 52
LONGEST_LINE = 10_000

_PREFIX = "trained_modules."


@dataclass(frozen=True)
class SavedGroup:
    """The description of one group in a file.

    Attributes:
        name: the name of the group and its network.
        legs: the line of its network.
        modes: the size of each mode, in the order of the axes.
        ranks: the size of each bond and each vector of hashed parameters, whose seed is in the line.
        parameters: the name of each parameter, in the order of the line.
        layers: the layer of the model for each position of the mode ``layer``.
        roles: the role for each position of the mode ``matrix``.
        sites: the projections.
        shared: for each parameter that another network also uses, the name of its tensor in the file.
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
        """The parsed line of legs."""
        return parse_line(self.legs)

    @property
    def group(self) -> Group:
        """The group, with the sites as they were saved."""
        on_stream, heads = "head" not in self.modes, self.modes.get("head", 1)
        return Group(self.name, heads, self.sites, self.layers, self.roles, on_stream)

    def keys_in_file(self) -> list[str]:
        """Return the name in the file of each parameter of the line."""
        return [self.shared.get(own, self.key_of(own)) for own in self.parameters]

    def key_of(self, own: str) -> str:
        """Return the name in the file that a parameter has if only this network uses it."""
        return f"networks.{self.name}.{own}"

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shape of each stored tensor of the line: that of the parameter, or of its vector."""
        return self.line.stored_shapes(self.sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every leg and every vector. The line has the sizes of the factors of split modes."""
        return {**self.line.split(Shape(self.modes)), **self.ranks}


@dataclass(frozen=True)
class Description:
    """The description of an adapter in its file.

    Attributes:
        format: `FORMAT`.
        format_version: `FORMAT_VERSION`.
        lortalib_version: the version of the library that wrote it.
        name: the name of the adapter.
        config: the arguments with which the adapter was made.
        trained_modules: the paths of the modules that were trained as a whole.
        base_model: class, model_type and name of the model, and shape_fingerprint of the sites.
        groups: the groups of sites that share a network.
        shared_weights: for each trained module, the weights of other modules that are the same tensor as
            one of its own; None if that is not known.
        tasks: the name of each position of the mode ``task``; empty if the networks have no such mode.
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
    tasks: tuple[str, ...] = ()

    def text(self) -> str:
        """Write the description as it stands in the file."""
        return json.dumps(asdict(self), allow_nan=False)

    def sites(self) -> Iterable[Site]:
        """List every projection that is updated."""
        return (site for group in self.groups for site in group.sites)


def parse_line(text: str) -> Legs:
    """Parse a line of legs from an untrusted file; its length is checked first.

    Raises:
        ValueError: a line that is too long or has too many parameters or legs; `LegsError`, a subclass,
            for an ill-formed line.
    """
    commas = re.sub(r"\([^()]*\)", "", text[: LONGEST_LINE + 1]).count(",")
    if len(text) > LONGEST_LINE or commas >= MOST_PARAMETERS:
        raise ValueError(
            f"a line of {len(text):,} characters and {commas + 1:,} parameters; at most "
            f"{LONGEST_LINE:,} and {MOST_PARAMETERS} are read"
        )
    legs = set(re.sub(r"\([^()]*\)", " ", text).replace(",", " ").split())
    if len(legs) > MOST_LEGS:
        raise ValueError(f"a line of {len(legs)} different legs; at most {MOST_LEGS} are read")
    return Legs.parse(text)


def trained_key(path: str, name: str) -> str:
    """Return the name in the file of one value of a trained module."""
    return f"{_PREFIX}{path}:{name}"


def values_of(description: Description, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Find, for each trained module, the tensors in the file that are its values, by name in the module.

    Args:
        description: the description in the file.
        names: the names of all tensors in the file.
    """
    found: dict[str, dict[str, str]] = {path: {} for path in description.trained_modules}
    for name in names:
        path, colon, own = name.removeprefix(_PREFIX).partition(":")
        if name.startswith(_PREFIX) and colon and path in found:
            found[path][own] = name
    return found
