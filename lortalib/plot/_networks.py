"""Plots measures of networks: singular values, congruence, errors of fits."""

from __future__ import annotations

from .. import decomp
from .._kinds import Kind, takes
from ..decomp import RankTable, TensorNetwork
from ._axes import Axes, heat_map, new_axes


def singular_values(net: TensorNetwork, *, ax: Axes | None = None) -> Axes:
    """Plot the singular values of the unfolding along each mode, relative to the largest.

    Args:
        net: the network; see `lortalib.decomp.singular_values`.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from lortalib.decomp import cp
        >>> ax = singular_values(cp((3, 2, 4, 8, 6), 2, init="normal"))
        >>> [line.get_label() for line in ax.lines]
        ['layer', 'head', 'matrix', 'in', 'out']
    """
    ax = new_axes(ax)
    ax.set(xlabel="number", ylabel="singular value / largest", yscale="log", ylim=(1e-8, 2))
    for mode, values in decomp.singular_values(net).items():
        relative = values / values[0] if values[0] > 0 else values
        ax.plot(range(1, len(values) + 1), relative.tolist(), "o-", ms=3, label=mode)
    ax.legend()
    return ax


def congruence(
    net: TensorNetwork,
    other: TensorNetwork | None = None,
    bond: str | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Plot the cosines between the summands of the sum over a bond, of one network or of two.

    Args:
        net: the network; see `lortalib.decomp.congruence`.
        other: the network whose summands are compared; by default ``net`` itself.
        bond: the bond that numbers the summands.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The axes.

    Raises:
        ValueError: other modes or sizes, or split modes without common factors; no such bond, or several to
            choose from.
        ImportError: matplotlib is not installed.

    Example:
        >>> from lortalib.decomp import cp
        >>> congruence(cp((3, 2, 4, 8, 6), 2, init="normal")).get_xlabel()
        'component'
    """
    cosines = decomp.congruence(net, other, bond).tolist()
    ax = new_axes(ax, 4.5)
    heat_map(
        ax,
        cosines,
        x=("component" if other is None else "component of the other", range(len(cosines[0]))),
        y=("component", range(len(cosines))),
        unit="cosine",
        limits=(-1, 1),
    )
    return ax


_TABLE = Kind(
    "the table that lortalib.decomp.suggest_rank returns",
    lambda value: isinstance(value, RankTable),
)


@takes(table=_TABLE)
def ranks(table: RankTable, *, ax: Axes | None = None) -> Axes:
    """Plot the errors of fits against the number of parameters, with the suggested rank marked.

    Args:
        table: what `lortalib.decomp.suggest_rank` returned.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The axes.

    Raises:
        ValueError: the table has no errors, as that of `lortalib.decomp.budget`.
        ImportError: matplotlib is not installed.

    Example:
        >>> from lortalib.decomp import suggest_rank, tucker
        >>> truth = tucker({"layer": 4, "in": 8, "out": 8}, 2, init="normal")
        >>> [line.get_label() for line in ranks(suggest_rank(truth, "tucker", (1, 2, 3))).lines]
        ['error', 'suggested: rank 2']
    """
    if any(row.error is None for row in table):
        raise ValueError("the table has no errors of fits; make it with decomp.suggest_rank")
    ax = new_axes(ax)
    numbers = [row.parameters for row in table]
    for name in ("error", "held_out"):
        errors = [getattr(row, name) for row in table]
        if any(error is not None for error in errors):
            ax.plot(numbers, errors, "o-", ms=4, label=name.replace("_", " "))
    if table.best is not None:
        best = table.suggested
        ax.axvline(best.parameters, color="0.5", ls="--", label=f"suggested: rank {best.rank}")
    ax.set(xlabel="trainable parameters", ylabel="relative error", xscale="log", ylim=(0, None))
    ax.legend()
    return ax
