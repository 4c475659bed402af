"""Prints the parameters of a network as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def describe(net: Any) -> str:
    """Describe a network: its modes, and a table of its parameters.

    Args:
        net: a `TensorNetwork`.
    """
    rows = []
    for k, (name, term) in enumerate(zip(net.names, net.legs.terms)):
        sizes = " x ".join(str(net.sizes[leg]) for leg in term.legs)
        number = net.stored[k].numel() if net.legs.holders[k] == k else None
        rows.append((name, str(term), sizes, number))
    modes = ", ".join(f"{mode}={size}" for mode, size in net.shape.items())
    head = f"{type(net).__name__}({modes}): {net.count():,} trainable parameters"
    return "\n".join([head, *parameter_table(rows, net.count(trainable_only=False))])


def parameter_table(rows: Iterable[tuple[str, str, str, int | None]], total: int) -> Iterator[str]:
    """Format the lines of a table, with a head and a total.

    Args:
        rows: for each term its name, its legs, its sizes, and the number of its parameters; None where they
            are counted in another row.
        total: the number of all parameters.
    """
    cells = [("parameter", "legs", "sizes", "parameters")]
    cells += [(*texts, "" if number is None else f"{number:,}") for *texts, number in rows]  # type: ignore[misc]
    cells.append(("total", "", "", f"{total:,}"))
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths))
        yield f"  {left}  {row[3].rjust(widths[3])}"
