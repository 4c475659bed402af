"""Describes an adapter for its file: its groups, its networks, and the model that it was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..._version import __version__
from .._adapter import Adapter
from .._anatomy import Site
from .schema import FORMAT, FORMAT_VERSION, Description, SavedGroup
from .weights import shared_weights


def describe(adapter: Adapter, model: nn.Module) -> Description:
    """Make the description of an adapter; no number of a tensor is looked at.

    Args:
        adapter: an adapter.
        model: the model that carries it.
    """
    config = getattr(model, "config", None)
    return Description(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        lortalib_version=__version__,
        name=adapter.name,
        config=adapter.config,
        trained_modules=adapter.trained_modules.paths,
        base_model={
            "class": type(model).__name__,
            "model_type": _text(getattr(config, "model_type", None)),
            "name": _text(getattr(config, "_name_or_path", None)),
            "shape_fingerprint": fingerprint(adapter.sites),
        },
        groups=describe_groups(adapter),
        shared_weights=shared_weights(model, adapter.trained_modules.paths),
        tasks=adapter.tasks,
    )


def stored_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the parameters of an adapter's networks by their names in its file, each once."""
    return _groups(adapter)[1]


def describe_groups(adapter: Adapter) -> tuple[SavedGroup, ...]:
    """Describe the groups of an adapter and their networks; no number of a tensor is looked at."""
    return _groups(adapter)[0]


def _groups(adapter: Adapter) -> tuple[tuple[SavedGroup, ...], dict[str, Tensor]]:
    owned: dict[int, str] = {}  # a parameter that several networks share is stored once
    tensors: dict[str, Tensor] = {}
    groups = []
    for group in adapter.groups:
        network = adapter.tensor(group)
        saved = SavedGroup(
            name=group.name,
            legs=str(network.legs),
            modes=dict(network.shape),
            ranks={**network.ranks, **network.vectors},
            parameters=network.names,
            layers=group.layers,
            roles=group.roles,
            sites=group.sites,
            shared={},
        )
        for name, tensor in zip(
            network.names, network.stored
        ):  # `tensors` keeps them, and so their ids
            key = saved.key_of(name)
            if owned.setdefault(id(tensor), key) == key:
                tensors[key] = tensor
            else:
                saved.shared[name] = owned[id(tensor)]
        groups.append(saved)
    return tuple(groups), tensors


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def fingerprint(sites: Iterable[Site]) -> str:
    """Compute a digest of the identities and weight shapes of sites.

    Args:
        sites: the sites of an adapter.
    """
    shapes = sorted((*site.key, *site.weight_shape) for site in sites)
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
