"""Makes axes, and fills them with a matrix of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._kinds import Kind

#: Matplotlib's axes; the type is loose because matplotlib is optional.
Axes = Any

_AXES = Kind(
    "axes of matplotlib, such as pyplot.subplots() returns, or None",
    lambda value: value is None or (hasattr(value, "imshow") and hasattr(value, "plot")),
)


def new_axes(ax: Axes | None, width: float = 5.0, height: float = 3.5) -> Axes:
    """Return ``ax``, or the axes of a new figure.

    Args:
        ax: axes, or None.
        width: width of the new figure in inches.
        height: its height in inches.

    Raises:
        TypeError: the axes are none.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as missing:
        raise ImportError(
            'plots need matplotlib, which is not installed; pip install "lortalib[plots]"'
        ) from missing
    _AXES.check("ax", ax)
    if ax is not None:
        return ax
    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def heat_map(
    ax: Axes,
    values: Sequence[Sequence[float]],
    *,
    x: tuple[str, Sequence[object]],
    y: tuple[str, Sequence[object]],
    unit: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a matrix as colours, with a colour bar.

    Args:
        ax: the axes.
        values: the rows, from the bottom up; NaN stays empty.
        x: what the columns are, and the name of each.
        y: what the rows are, and the name of each.
        unit: what the colours show.
        limits: the values at the ends of the colours; zero and the largest value by default.
    """
    signed = limits is not None
    image = ax.imshow(
        values,
        aspect="auto",
        origin="lower",
        cmap="RdBu_r" if signed else "viridis",
        vmin=limits[0] if limits else 0,
        vmax=limits[1] if limits else None,
    )
    for axis, (what, names) in ((ax.xaxis, x), (ax.yaxis, y)):
        step = max(1, -(-len(names) // 16))
        axis.set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])
        axis.set_label_text(what)
    ax.figure.colorbar(image, ax=ax, label=unit)
