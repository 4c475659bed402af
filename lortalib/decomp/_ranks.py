"""Reads ranks: one for all bonds, one for each, or a mapping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union, cast

from .._kinds import is_integer
from ._legs import Legs

#: A rank is one size for every bond, one size for each bond in the order of the line, or a mapping from
#: bond to size. The vectors of hashed parameters stand among the bonds in the sequence and the mapping.
Rank = Union[int, Sequence[int], Mapping[str, int]]


def read_ranks(
    legs: Legs, modes: Sequence[str], rank: Rank, present: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Read the size of each bond, and of the vectors that it is given for.

    Args:
        legs: the line.
        modes: the names of the tensor's axes.
        rank: as for `network`.
        present: the sizes of bonds that a mapping may leave out.

    Returns:
        A size for each bond, and for vectors if they are given, in the order of the line.

    Raises:
        ValueError: a rank that is no integer above 0, a wrong number of ranks, a bond without a rank or an
            unknown one.
    """
    bonds, names = legs.bonds(modes), legs.ranked(modes)
    line = legs.line or str(legs)
    what = "bonds" if names == bonds else "bonds and vectors"
    if isinstance(rank, Mapping):
        given = {**(present or {}), **rank}
        # A vector may be left out, as where one integer is given.
        if not set(bonds) <= set(given) <= set(names):
            raise ValueError(
                f"ranks were given for {', '.join(map(str, rank)) or 'no bond'}; the {what} are "
                f"{', '.join(names) or 'none'}, in\n    {line}"
            )
        found = {name: given[name] for name in names if name in given}
    elif isinstance(rank, Sequence) and not isinstance(rank, (str, bytes)):
        if len(rank) != len(names):
            raise ValueError(
                f"{len(rank)} ranks were given, {tuple(rank)}; the {what} are "
                f"{', '.join(names) or 'none'}, in\n    {line}"
            )
        found = dict(zip(names, rank))
    else:
        found = dict.fromkeys(bonds, cast(int, rank))
    for name, size in found.items():
        if not is_integer(size) or size < 1:
            kind = "size of vector" if name in legs.vectors else "rank of bond"
            raise ValueError(f"the {kind} {name!r} must be an integer >= 1; found {size!r}")
    return {name: int(size) for name, size in found.items()}
