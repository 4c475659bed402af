"""Plots where an adapter changes its model."""

from __future__ import annotations

import math

from .._kinds import TEXT, Kind, takes
from ..nn import Adapter, Group, Site
from ._axes import Axes, heat_map, new_axes

_ADAPTER = Kind(
    "an adapter, which lortalib.nn.apply returns", lambda value: isinstance(value, Adapter)
)


@takes(adapter=_ADAPTER, group=TEXT.or_none)
def layers(adapter: Adapter, *, group: str | None = None, ax: Axes | None = None) -> Axes:
    """Plot the Frobenius norm of each weight's update, by layer and matrix.

    Args:
        adapter: the adapter.
        group: the name of the group of sites; may be left out if there is only one.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The axes.

    Raises:
        ValueError: no such group, or several to choose from.
        ImportError: matplotlib is not installed.

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> ax = layers(lortalib.nn.apply(model, "cp", rank=2))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('layer', 'matrix')
    """
    chosen = _group(adapter, group)
    table = _by_layer(chosen)
    values = [
        [_norm(adapter, table.get((role, layer))) for layer in chosen.layers]
        for role in chosen.roles
    ]
    ax = new_axes(ax, 2 + 0.3 * len(chosen.layers), 1.5 + 0.3 * len(chosen.roles))
    heat_map(
        ax, values, x=("layer", chosen.layers), y=("matrix", chosen.roles), unit="norm of update"
    )
    return ax


@takes(adapter=_ADAPTER, matrix=TEXT, group=TEXT.or_none)
def heads(
    adapter: Adapter, matrix: str = "q", *, group: str | None = None, ax: Axes | None = None
) -> Axes:
    """Plot the Frobenius norm of each head's update of one kind of matrix, by layer and head.

    Args:
        adapter: the adapter.
        matrix: the role of the sites, such as ``"q"``.
        group: the name of the group of sites; may be left out if only one has the role.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The axes.

    Raises:
        ValueError: no group has the role, no such group, or several to choose from.
        ImportError: matplotlib is not installed.

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> heads(lortalib.nn.apply(model, "cp", rank=2), "v").get_title()
        'v'
    """
    chosen = _group(adapter, group, matrix)
    table = _by_layer(chosen)
    rows = []
    for layer in chosen.layers:
        site = table.get((matrix, layer))
        rows.append([] if site is None else adapter.norms(site).flatten().tolist())
    count = max(map(len, rows))
    ax = new_axes(ax, 2 + 0.3 * count, 1.5 + 0.25 * len(rows))
    filled = [row + [math.nan] * (count - len(row)) for row in rows]
    heat_map(
        ax, filled, x=("head", range(count)), y=("layer", chosen.layers), unit="norm of update"
    )
    ax.set_title(matrix)
    return ax


def _group(adapter: Adapter, name: str | None, role: str | None = None) -> Group:
    fitting = [g for g in adapter.groups if role is None or role in g.roles]
    found = [g for g in fitting if name is None or g.name == name]
    if len(found) == 1:
        return found[0]
    there = ", ".join(f"{g.name!r} with {' '.join(g.roles)}" for g in adapter.groups)
    asked = f"group {name!r}" if name else "one group"
    raise ValueError(
        f"asked for {asked}{f' with the matrix {role!r}' if role else ''}; "
        f"adapter {adapter.name!r} has {there}"
    )


def _by_layer(group: Group) -> dict[tuple[str, int], Site]:
    return {(site.role, site.layer): site for site in group.sites}


def _norm(adapter: Adapter, site: Site | None) -> float:
    return math.nan if site is None else float(adapter.norms(site).square().sum().sqrt())
