"""Holds tables of ranks: what each costs and how near it comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .._columns import aligned
from ._ranks import Rank


@dataclass(frozen=True)
class RankRow:
    """What one choice of ranks costs and gives.

    Attributes:
        format: the name of the format, or the line.
        rank: the ranks, as `network` takes them.
        parameters: the number of trainable parameters.
        error: the relative error of a fit; None if nothing was fitted.
        held_out: the relative error over entries that a second fit did not see; None without one.
        core_consistency: of CP, in percent; None for other lines.

    Example:
        >>> from lortalib.decomp import budget
        >>> row = budget({"layer": 6, "in": 64, "out": 16}, parameters=200, lines=["cp"])[0]
        >>> row.format, row.rank, row.parameters
        ('cp', {'r': 2}, 172)
    """

    format: str
    rank: Rank
    parameters: int
    error: float | None = None
    held_out: float | None = None
    core_consistency: float | None = None


@dataclass(frozen=True)
class RankTable(Sequence[RankRow]):
    """A table with a row for each choice of ranks; printing it shows the table.

    Attributes:
        rows: the rows.
        best: the index of the row that is suggested, or None.
        refused: for each format that has no row, the reason.

    Example:
        >>> from lortalib.decomp import budget
        >>> table = budget({"layer": 6, "in": 64, "out": 16}, parameters=200, lines=["cp", "tt"])
        >>> len(table), sorted(row.format for row in table)
        (2, ['cp', 'tt'])
    """

    rows: tuple[RankRow, ...]
    best: int | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def suggested(self) -> RankRow:
        """The row that is suggested.

        Raises:
            LookupError: no row is.
        """
        if self.best is None:
            raise LookupError("this table compares formats and suggests none")
        return self.rows[self.best]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.rows[index]

    def __iter__(self) -> Iterator[RankRow]:
        return iter(self.rows)

    def __repr__(self) -> str:
        head = ["format", "rank", "parameters"]
        optional = [
            name
            for name in ("error", "held_out", "core_consistency")
            if any(getattr(row, name) is not None for row in self.rows)
        ]
        lines = [[*head, *(name.replace("_", " ") for name in optional), ""]]
        for k, row in enumerate(self.rows):
            values = [getattr(row, name) for name in optional]
            cells = ["" if value is None else f"{value:.4g}" for value in values]
            mark = "<- suggested" if k == self.best else ""
            lines.append([row.format, _short(row.rank), f"{row.parameters:,}", *cells, mark])
        reasons = (f"{name}: {reason}" for name, reason in self.refused.items())
        return "\n".join([*aligned(lines), *reasons])


def _short(rank: Rank) -> str:
    if isinstance(rank, dict):
        return " ".join(f"{bond}={size}" for bond, size in rank.items())
    return str(rank)
