"""The cells that the benchmarks of a training step fill: a model, a batch, and the contenders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import subjects
from measure import Progress
from subjects import Contender
from torch import nn

RANKS = (4, 16, 64)
MIDDLE = 16  # rank of VeRA, of dense LoRTA and of other ways to train
FLOOR = Contender("floor")

Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """A model and a batch.

    Attributes:
        model: name in `subjects.MODELS`.
        rows: sequences in the batch.
        length: tokens of a sequence.
        share: rounds relative to ``--repetitions``; short steps can have more.
        ranks: ranks that are compared.
    """

    model: str
    rows: int
    length: int
    share: float = 1.0
    ranks: tuple[int, ...] = RANKS

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.rows * self.length


def contenders(ranks: Iterable[int]) -> list[Contender]:
    """All that are compared, with those of one rank together."""
    chosen = [FLOOR]
    for rank in ranks:
        chosen += [Contender(kind, rank) for kind in ("cp", "lora", "tucker", "tt")]
        if rank == MIDDLE:
            chosen += [Contender("vera", rank), Contender("dense", rank)]
    return chosen


def fill(
    cells: Iterable[Cell], measure: Callable[[nn.Module, Cell], Entries], progress: Progress
) -> Entries:
    """Measure all cells.

    Args:
        cells: those of one model one after the other, as they have its base in common.
        measure: from a base and a cell to an entry for each contender.
        progress: says which cell is done.
    """
    entries: Entries = []
    for model, own in groupby(cells, key=lambda cell: cell.model):
        base = subjects.load(model)
        for cell in own:
            entries += measure(base, cell)
            progress.say(f"{cell.model}, {cell.tokens} tokens")
    return entries


def sections(entries: Entries, section: Callable[[Entries], Sequence[str]]) -> list[str]:
    """Head what `section` makes of the entries of each model with the model's name."""
    parts = []
    for model in dict.fromkeys(entry["model"] for entry in entries):
        own = [entry for entry in entries if entry["model"] == model]
        parts += [f"## {model}", *section(own)]
    return parts


def ordered(entries: Iterable[dict[str, Any]]) -> Entries:
    """Sort entries by contender, then rank."""
    kinds = list(subjects.LABELS)
    return sorted(entries, key=lambda entry: (kinds.index(entry["kind"]), entry["rank"]))
