"""Reads which adapter each row, or each token, of a batch uses."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple, Union

from torch import Tensor

from .._forward import EvenRows, TokenRows

#: A name, or None, for every row of a batch; or for every token, as a list for every row.
Names = Union[Iterable[Hashable], Iterable[list[Hashable]], Tensor]


class Chosen(NamedTuple):
    """The adapters that the rows or tokens of a batch use.

    Attributes:
        names: the name of each row of the layout.
        layout: the arrangement of the tokens in rows of one adapter.
        shape: (rows,), of which a batch is a multiple; or (rows, tokens) of the batch.
    """

    names: list[Hashable]
    layout: EvenRows | TokenRows
    shape: tuple[int, ...]

    @classmethod
    def one(cls, name: Hashable) -> Chosen:
        """Choose one name for all rows of a batch of any size."""
        return cls([name], EvenRows(1), (1,))


def read_names(names: Names) -> Chosen:
    """Read a name for every row, or for every token.

    Args:
        names: names or None; a list of lists, or a tensor or array of two axes, has a name for every token.

    Raises:
        ValueError: no names, or rows of different lengths.
        TypeError: one name in place of several, or lists beside names.

    Example:
        >>> read_names(["ann", None]).layout
        EvenRows(number=2)
        >>> read_names([["ann", "ann", "bob"]]).names
        ['ann', 'bob']
    """
    if isinstance(names, str):
        raise TypeError(
            f"using() needs a name, or None, for every row of the batch; found the text {names!r}: "
            "give it in a list, as often as there are rows"
        )
    if hasattr(names, "tolist"):  # a tensor, or an array of numpy
        names = names.tolist()
    if not isinstance(names, Iterable):
        raise TypeError(
            f"using() needs a name, or None, for every row of the batch; found {names!r}: give a list, "
            f"such as [{names!r}]"
        )
    rows: list[Any] = list(names)
    if not rows or rows == [[]] * len(rows):
        raise ValueError("using() needs a name, or None, for every row of the batch; found none")
    nested = [isinstance(row, list) for row in rows]
    if not any(nested):
        return Chosen(rows, EvenRows(len(rows)), (len(rows),))
    if not all(nested):
        raise TypeError(
            "using() needs a name for every row, or for every row a list with a name for every token; "
            f"found {rows[nested.index(False)]!r} beside lists"
        )
    if any(isinstance(name, list) for row in rows for name in row):
        raise TypeError("using() needs a name for every row or token; found lists within lists")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise ValueError(
            "the lists of names need one length, that of input_ids; found the lengths "
            f"{', '.join(map(str, sorted(lengths)))}. Give padding the name None"
        )
    tokens = [name for row in rows for name in row]
    number = {name: k for k, name in enumerate(dict.fromkeys(tokens))}
    layout = TokenRows([number[name] for name in tokens])
    distinct = list(number)
    return Chosen([distinct[k] for k in layout.owners], layout, (len(rows), len(rows[0])))
