"""Checks that the parts of a description agree with each other and with the tensors of the file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...decomp import Network
from .._anatomy import Site
from .._config import AdapterConfig, check_acts_on, check_alpha
from .._plan import share_input_factor
from .._task_lines import TASK, check_dropout, check_task_names, line_of_one_task
from .records import read_record, short
from .schema import Description, SavedGroup, values_of
from .tensors import TRAINABLE, TensorSpec

#: Limits far above any real adapter, so that an untrusted file cannot use up time or memory.
MOST_SITES = 100_000
MOST_GROUPS = 2_000
MOST_TRAINED_MODULES = 1_000
LONGEST_PATH = 500
LARGEST_SIZE = 2**24
MOST_HASHED = 2**27

_BASE_MODEL = ("class", "model_type", "name", "shape_fingerprint")


def check_description(value: Any) -> Description:
    """Read the description from a JSON value, and check it.

    Raises:
        ValueError: a field that is missing, unknown, of the wrong type, out of bounds, or in conflict
            with another.
    """
    if isinstance(value, dict):
        _check_lengths(value.get("groups"))
    description = read_record(Description, value)
    if not description.name or "." in description.name:
        raise ValueError(f"an adapter is called {short(description.name)}")
    unknown = set(description.base_model) - set(_BASE_MODEL)
    if unknown:
        raise ValueError(f"unknown field {short(min(unknown))} of base_model")
    _check_config(description.config)
    _check_tasks(description)
    _check_groups(description)
    _check_trained(description)
    return description


def _check_lengths(groups: Any) -> None:
    """Check the lengths of all lists first, because reading them takes time."""
    if not isinstance(groups, list) or not 0 < len(groups) <= MOST_GROUPS:
        raise ValueError(f"field 'groups' is no list of 1 to {MOST_GROUPS:,} groups")
    listed = [group.get("sites") for group in groups if isinstance(group, dict)]
    if sum(len(sites) for sites in listed if isinstance(sites, list)) > MOST_SITES:
        raise ValueError(f"there are more than {MOST_SITES:,} sites")


def _check_config(config: AdapterConfig) -> None:
    check_alpha(config.alpha)
    check_acts_on(config.acts_on)
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout is {config.dropout}")
    if config.gqa not in ("pool", "split"):
        raise ValueError(f"gqa is {short(config.gqa)}")
    # With LoRTA's start the scaling is alpha/r; with all other starts it is alpha.
    ratio = config.alpha / config.scaling if config.scaling else math.inf
    parts = max(1, round(ratio)) if config.init == "lorta" and math.isfinite(ratio) else 1
    if not math.isclose(ratio, parts, rel_tol=1e-6):
        raise ValueError(
            f"scaling {config.scaling:g} does not follow from alpha {config.alpha:g} and init "
            f"{short(config.init)}"
        )


def _check_tasks(description: Description) -> None:
    names = check_task_names(description.tasks)
    if names:
        check_dropout(description.config.dropout)
    for saved in description.groups:
        if saved.modes.get(TASK, 0) != len(names):
            raise ValueError(
                f"the tasks {short(names)} do not fit the modes of {short(saved.name)}"
            )
        if names:
            line_of_one_task(saved.line)
            if any(site.experts for site in saved.sites):
                raise ValueError(f"group {short(saved.name)} has tasks and packed experts")


def _check_groups(description: Description) -> None:
    names = [saved.name for saved in description.groups]
    if len(set(names)) < len(names):
        raise ValueError("two groups have one name")
    taken = nn.ModuleDict()
    for name in names:
        if not name or "." in name or hasattr(taken, name):
            raise ValueError(f"no group can be called {short(name)}")
    keys = [site.key for site in description.sites()]
    if len(set(keys)) < len(keys):
        raise ValueError("a site stands there twice")
    owners = {
        saved.key_of(own): shape
        for saved in map(_check_group, description.groups)
        for own, shape in zip(saved.parameters, saved.shapes())
        if own not in saved.shared
    }
    for saved in description.groups:
        for own, key, shape in zip(saved.parameters, saved.keys_in_file(), saved.shapes()):
            if owners.get(key) != shape:
                raise ValueError(f"{saved.key_of(own)} would be shared with {short(key)}")
    on_stream = description.config.acts_on == "stream"
    for saved in description.groups:
        if saved.group.on_stream != on_stream:
            raise ValueError(f"the modes of group {short(saved.name)} do not fit acts_on")
    if description.config.share_residual:
        _check_shared_input(description.groups)


def _check_group(saved: SavedGroup) -> SavedGroup:
    name, line = short(saved.name), saved.line
    for sizes in (saved.modes, saved.ranks):
        if not all(0 < size <= LARGEST_SIZE for size in sizes.values()):
            raise ValueError(f"the sizes of group {name} are {short(sizes)}")
    line.check(tuple(saved.modes))
    if set(line.ranked(saved.modes)) != set(saved.ranks):
        raise ValueError(f"the ranks {short(saved.ranks)} of group {name} are not of its bonds")
    # The tensors of hashed parameters are larger than what the file holds of them.
    entries = [math.prod(saved.sizes[leg] for leg in term.legs) for term in line.terms if term.of]
    if sum(entries) > MOST_HASHED:
        raise ValueError(f"group {name} hashes {sum(entries):,} entries; {MOST_HASHED:,} are read")
    own = saved.parameters
    alike = len(own) == len(line.terms) and [own.index(each) for each in own] == [*line.holders]
    if not alike or "" in own or "." in "".join(own):
        raise ValueError(f"the parameters of group {name} are called {short(own)}")
    if set(saved.shared) - set(own):
        raise ValueError(f"the shared parameters of group {name} are {short(saved.shared)}")
    layers, roles = set(saved.layers), set(saved.roles)
    if len(layers) < len(saved.layers) or len(roles) < len(saved.roles):
        raise ValueError(f"a layer or role stands twice in group {name}")
    if not (saved.sites and layers and roles):
        raise ValueError(f"group {name} has no sites, layers or roles")
    group = saved.group
    for site in saved.sites:
        _check_site(site)
        if site.layer not in layers or site.role not in roles or group.heads % site.heads:
            raise ValueError(f"site {short(site.key)} is outside its group {name}")
        written = site.width if group.on_stream else site.head_dim
        if (site.width, written, site.experts) != (
            saved.modes.get("in"), saved.modes.get("out"), saved.modes.get("expert", 0)
        ):  # fmt: skip
            raise ValueError(f"site {short(site.key)} does not fit the modes of {name}")
    if dict(group.shape) != {mode: n for mode, n in saved.modes.items() if mode != TASK}:
        raise ValueError(f"the modes {short(saved.modes)} of group {name} do not fit its sites")
    return saved


def _check_site(site: Site) -> None:
    sizes = site.heads, site.query_heads, site.head_dim, site.width
    if not site.role or "." in site.role or min(sizes) < 1 or site.experts < 0 or site.layer < 0:
        raise ValueError(f"a site is {short(site)}")
    if max(*sizes, site.experts, site.features, site.fused or 0) > LARGEST_SIZE:
        raise ValueError(f"a size of site {short(site.key)} is above {LARGEST_SIZE:,}")
    rows = site.rows
    if (rows is None) != (site.fused is None):
        raise ValueError(f"site {short(site.key)} has one of rows and fused")
    if rows is not None:
        last = rows.offset + sum((size - 1) * stride for size, stride in rows.dims)
        dims = [number for pair in rows.dims for number in pair]
        fits = rows.offset >= 0 and min(dims, default=1) > 0 and last < (site.fused or 0)
        if not fits or math.prod(size for size, _ in rows.dims) != site.features:
            raise ValueError(f"the rows of site {short(site.key)} are {short(rows)}")


def _check_shared_input(groups: Iterable[SavedGroup]) -> None:
    """Check that the tensors shared are those that the rule of ``share_residual`` gives."""
    owners: dict[str, nn.Parameter] = {}
    networks: dict[str, Network] = {}
    for saved in groups:
        empty = [torch.empty(shape, device="meta") for shape in saved.shapes()]
        network = Network(saved.line, empty, tuple(saved.modes), sizes=saved.sizes)
        networks[saved.name] = network
        for name, key, tensor in zip(network.names, saved.keys_in_file(), network.stored):
            network.register_parameter(name, owners.setdefault(key, nn.Parameter(tensor)))
    before = [id(tensor) for network in networks.values() for tensor in network.stored]
    share_input_factor([saved.group for saved in groups], networks)
    if before != [id(tensor) for network in networks.values() for tensor in network.stored]:
        raise ValueError(
            "share_residual is true, but two networks have factors of their own for in"
        )


def _check_trained(description: Description) -> None:
    paths = description.trained_modules
    listed = set(paths)
    if len(listed) < len(paths) or len(paths) > MOST_TRAINED_MODULES:
        raise ValueError(f"the trained modules are {short(paths)}")
    if set(description.shared_weights or ()) - listed:
        raise ValueError("field 'shared_weights' speaks of modules that were not trained")
    sites = [path for site in description.sites() for path in (site.path, *site.tied_paths)]
    for path in (*paths, *sites):
        if not path or len(path) > LONGEST_PATH:
            raise ValueError(f"the path of a module is {short(path)}")
    for path in paths:
        if ":" in path or listed.intersection(_owners(path)):
            raise ValueError(f"{path!r} cannot be a trained module")
    for path in sites if listed else ():
        inside = listed.intersection((path, *_owners(path)))
        if inside:
            raise ValueError(
                f"the trained module {min(inside)!r} holds the adapted projection {path!r}"
            )


def _owners(path: str) -> Iterable[str]:
    """Return the paths of the modules that contain a module."""
    words = path.split(".")
    return (".".join(words[:k]) for k in range(1, len(words)))


def check_tensors(description: Description, specs: Mapping[str, TensorSpec]) -> None:
    """Check the header's names, shapes and dtypes against the description, without reading a tensor.

    Raises:
        ValueError: a tensor that is missing or unknown, or has the wrong shape or dtype.
    """
    known = {name for each in values_of(description, specs).values() for name in each.values()}
    for saved in description.groups:
        found = []
        for key, shape, term in zip(saved.keys_in_file(), saved.shapes(), saved.line.terms):
            if key not in specs:
                raise ValueError(f"it lacks the tensor {key!r}")
            if specs[key].shape != shape:
                raise ValueError(
                    f"tensor {key!r} has the shape {specs[key].shape}; its legs ({term}) have the "
                    f"sizes {shape}"
                )
            if specs[key].dtype not in TRAINABLE:
                raise ValueError(
                    f"factor {key!r} is of type {specs[key].dtype}, no numbers to train; convert it "
                    f"to one of {', '.join(TRAINABLE)}"
                )
            found.append(key)
        known.update(found)
        if len({specs[key].dtype for key in found}) > 1:
            raise ValueError(f"the factors of group {saved.name!r} are of different types")
    unknown = [name for name in specs if name not in known]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(f"it holds unknown tensors: {', '.join(map(short, unknown[:5]))}{more}")
    for path, values in values_of(description, specs).items():
        if not values:
            raise ValueError(f"it lacks the values of the trained module {path!r}")
