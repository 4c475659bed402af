"""Defines a completion that somebody waits for, and how its tokens are drawn."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Latest:
    """Holds the newest of the values that were put into it, whatever the pace of the reader."""

    def __init__(self) -> None:
        self._is_there = threading.Event()
        self._value: Any = None

    def put(self, value: Any) -> None:
        """Replace the value."""
        self._value = value
        self._is_there.set()

    def get(self, timeout: float) -> Any:
        """Wait for a value that is new; None if none came within so many seconds."""
        if not self._is_there.wait(timeout):
            return None
        self._is_there.clear()  # before the value is read: one that comes between is read, and again
        return self._value


@dataclass
class Request:
    """A completion that somebody waits for.

    Attributes:
        ids: the token ids of the prompt.
        adapter: the name of the adapter; None for the base.
        length: the largest number of new tokens.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_p: the tokens to draw from are the likeliest ones, as few as have this probability together.
        seed: of the drawing; the same request with the same seed has the same answer.

    Example:
        >>> import torch
        >>> request = Request([5, 6, 7], temperature=0)
        >>> int(request.scores(torch.tensor([1.0, 3.0, 2.0])).argmax())
        1
    """

    ids: list[int]
    adapter: str | None = None
    length: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        # The notes of the engine: the name in the bank of its adapter, whether it has begun, its tokens.
        self.version: Hashable = None
        self.has_begun = False
        self.output = Latest()
        self._draw = torch.Generator()
        self._draw.seed() if self.seed is None else self._draw.manual_seed(self.seed)

    def scores(self, logits: Tensor) -> Tensor:
        """Return scores of which the largest is a draw from the distribution of the logits.

        Args:
            logits: of shape (vocabulary,).

        Returns:
            The scores, of the same shape.
        """
        if self.temperature == 0:
            return logits
        # In float64 and from the largest on, so that the smallest temperatures do not overflow.
        logits = (logits.double() - logits.max()) / self.temperature
        if self.top_p < 1:
            ranked, order = logits.softmax(-1).sort(descending=True)
            before = ranked.cumsum(-1) - ranked
            logits = logits.index_fill(-1, order[before >= self.top_p], -torch.inf)
        # The largest of logits with Gumbel noise is distributed as their softmax.
        drawn = torch.empty(logits.shape).exponential_(generator=self._draw)
        return logits - drawn.log().to(logits)
