"""Lists what a budget of trainable parameters buys on the projections of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from ..decomp import RankRow, RankTable, budget, formats
from ._anatomy import Site, UnsupportedModelError
from ._config import choose_acts_on
from ._group import group_sites
from ._stream import stream_sites


def budget_of_sites(
    sites: Sequence[Site], numbers: int, decompositions: object, gqa: str, acts_on: str | None
) -> RankTable:
    """List the ranks of each format whose trainable parameters come closest to a number from below.

    Args:
        sites: the projections to update.
        numbers: the largest number of trainable parameters, of all networks together.
        decompositions: names of formats and lines of legs, or one; None for every registered format.
        gqa: as for `apply`.
        acts_on: as for `apply`.

    Raises:
        ValueError: a number below 1, an unknown name, or a decomposition that is no text.
    """
    asked = formats if decompositions is None else decompositions
    lines: list[Any]
    lines = list(asked) if isinstance(asked, Iterable) and not isinstance(asked, str) else [asked]
    strange = next((line for line in lines if not isinstance(line, str)), None)
    if strange is not None:
        raise ValueError(
            f"with numbers=, decomposition is a name, a line of legs or a list of these; found {strange!r}"
        )
    by_kind: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        by_kind[choose_acts_on(line, acts_on)].append(line)
    rows: list[RankRow] = []
    refused: dict[str, str] = {}
    for kind, own in by_kind.items():
        on_stream = kind == "stream"
        try:
            groups = group_sites(stream_sites(sites) if on_stream else sites, gqa, on_stream)
        except UnsupportedModelError as error:
            # A part of a fused projection has no tensor on the stream.
            refused |= dict.fromkeys(own, str(error))
            continue
        table = budget([group.shape for group in groups], numbers, own)
        rows += table.rows
        refused |= table.refused
    rows.sort(key=lambda row: -row.parameters)
    return RankTable(tuple(rows), refused=refused)
