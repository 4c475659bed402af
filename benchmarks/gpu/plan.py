"""The cells of a run, the most telling first: a run that is cut off has these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cases import CONTENDERS, CP8, CP64, FLOOR, LORA, MERGED, WORKS

BANK = "rows of a bank"
EAGER, GRAPH, COMPILED = "eager", "CUDA graph", "compiled"


class Cell(NamedTuple):
    """One table: several contenders, timed in turn at one work.

    Attributes:
        model: its shape.
        work: what is timed.
        mode: how it runs.
        rows: of the batch.
        tokens: of a row.
    """

    model: str
    work: str
    mode: str
    rows: int
    tokens: int

    def contenders(self) -> list[str]:
        """Whose work it is. Compiling costs most of the time there is, so fewer are compiled."""
        if self.mode == COMPILED:
            return [FLOOR, CP8, LORA]
        if self.work == "decoding, pairs made anew":
            return [FLOOR, CP8, CP64]
        return [name for name in CONTENDERS if name != MERGED or self.work != "training step"]


def cells(small: bool) -> Iterator[Cell]:
    """All cells of a run.

    Args:
        small: whether the model is tiny.
    """
    if small:
        yield from _works("tiny", 2, 16, EAGER)
        yield Cell("tiny", BANK, EAGER, 4, 16)
        yield from _works("tiny", 2, 16, GRAPH)
        yield Cell("tiny", "training step", COMPILED, 2, 16)
        return
    yield from _works("1B", 8, 512, EAGER)
    yield Cell("1B", BANK, EAGER, 64, 16)
    yield from _works("1B", 8, 512, GRAPH)
    yield Cell("1B", "training step", COMPILED, 8, 512)
    yield from _works("7B", 2, 512, EAGER)
    yield Cell("7B", BANK, EAGER, 64, 16)
    yield from _works("7B", 2, 512, GRAPH)
    yield Cell("1B", "decoding", COMPILED, 8, 512)
    yield Cell("1B", "prefill", COMPILED, 8, 512)


def _works(model: str, rows: int, tokens: int, mode: str) -> Iterator[Cell]:
    for work in WORKS:
        yield Cell(model, work, mode, rows, tokens)
