"""Arranges the tokens of a batch in rows that have low-rank maps of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Layout(Protocol):
    """An arrangement of tokens in rows of equal length, each with maps of its own."""

    def split(self, x: Tensor) -> Tensor:
        """Arrange (..., features) as (rows, length, features)."""

    def join(self, x: Tensor) -> Tensor:
        """Arrange (rows, length, features) as (tokens, features), in the order before `split`."""


class EvenRows(NamedTuple):
    """A batch that is divided equally over its rows.

    Attributes:
        number: the number of rows.
    """

    number: int

    def split(self, x: Tensor) -> Tensor:
        """Arrange (..., features) as (rows, length, features)."""
        return x.reshape(self.number, -1, x.shape[-1])

    def join(self, x: Tensor) -> Tensor:
        """Arrange (rows, length, features) as (tokens, features), in the order before `split`."""
        return x.reshape(-1, x.shape[-1])


class TokenRows:
    """Tokens each with an owner, arranged such that every row has tokens of one owner.

    An owner of many tokens has several rows, none longer than the mean number of tokens of an owner. So
    there are at most twice as many rows as owners, and at most twice as many places as tokens, however
    unequally the tokens are divided.

    Args:
        owners: the owner of each token, as a number.

    Attributes:
        owners: the owner of each row.

    Example:
        >>> rows = TokenRows([0, 1, 1, 1, 1])
        >>> rows.owners
        [0, 1, 1]
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
        >>> rows.split(x).flatten(1).tolist()
        [[1.0, 0.0, 0.0], [2.0, 3.0, 4.0], [5.0, 0.0, 0.0]]
        >>> torch.equal(rows.join(rows.split(x)), x)
        True
    """

    def __init__(self, owners: Sequence[int]) -> None:
        members: dict[int, list[int]] = {}
        for token, owner in enumerate(owners):
            members.setdefault(owner, []).append(token)
        self._length = -(-len(owners) // len(members))
        self._tokens = len(owners)
        places = [0] * len(owners)
        self.owners: list[int] = []
        for owner, tokens in members.items():
            for start in range(0, len(tokens), self._length):
                row = len(self.owners)
                self.owners.append(owner)
                for k, token in enumerate(tokens[start : start + self._length]):
                    places[token] = row * self._length + k
        with torch.inference_mode(False):  # later forwards use them in any mode
            self._places = {torch.device("cpu"): torch.tensor(places)}

    def split(self, x: Tensor) -> Tensor:
        """Arrange (..., features) as (rows, length, features); places without a token are zero."""
        x = x.reshape(-1, x.shape[-1])
        room = x.new_zeros(len(self.owners) * self._length, x.shape[-1])
        return room.index_copy(0, self._on(x.device), x).view(
            len(self.owners), self._length, x.shape[-1]
        )

    def join(self, x: Tensor) -> Tensor:
        """Arrange (rows, length, features) as (tokens, features), in the order before `split`."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self._on(x.device))

    def _on(self, device: torch.device) -> Tensor:
        """Return the place of every token among all rows, in memory of a device."""
        if device not in self._places:
            self._places[device] = next(iter(self._places.values())).to(device)
        return self._places[device]


class RowMaps(NamedTuple):
    """The maps that rows have between the two maps of a pair.

    Attributes:
        layout: the arrangement of the tokens in rows; a row has as many as its maps.
        middle: (rows, heads read, heads written, c, p, q): from the p of each of c blocks of the first
            product to q in the second; None if rows differ in the two maps of the pair.
    """

    layout: Layout
    middle: Tensor | None

    def apply(self, h: Tensor, tokens: Sequence[int]) -> Tensor:
        """Multiply the first product of every token by the middle of its row.

        Args:
            h: (tokens, c * p), with an axis of heads behind the tokens if several are read.
            tokens: the leading axes of the tokens.

        Returns:
            (tokens, c * q), with an axis of heads behind the tokens if several are written.
        """
        if self.middle is None:
            return h
        read, written, c, p, q = self.middle.shape[1:]
        split = self.layout.split(h.reshape(*tokens, read * c * p))
        split = split.unflatten(-1, (read, c, p))
        found = torch.einsum("rlgcp,rghcpq->rlhcq", split, self.middle).to(h.dtype)
        return self.layout.join(found.flatten(2)).view(*tokens, written, c * q)
