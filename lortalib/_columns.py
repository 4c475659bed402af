"""Aligns the columns of tables that are printed as text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one line for each row, with each column as wide as its longest cell.

    Args:
        rows: cells, as many in each row.

    Example:
        >>> aligned([["format", "rank"], ["cp", "4"]])
        ['format  rank', 'cp      4']
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    ]
