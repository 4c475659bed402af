"""Finds the ranks of each format that make the most of a budget of trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Union

from .._kinds import TEXTS, takes
from ._formats import Format, formats, get_format
from ._full import check_full
from ._legs import Legs
from ._modes import Shape, ShapeLike
from ._rank_table import RankRow, RankTable

#: One shape, or the shapes of several networks that have the same ranks.
Shapes = Union[ShapeLike, Sequence[Mapping[str, int]]]


@takes(lines=TEXTS.or_none)
def budget(shape: Shapes, parameters: int, lines: Iterable[str] | None = None) -> RankTable:
    """List, for each format, the ranks whose trainable parameters come closest to a budget from below.

    All bonds first get the largest equal rank; then single bonds are raised, in the order of the line.

    Args:
        shape: five sizes, or a mapping from mode names to sizes; or a list of such mappings, for networks
            that have equal ranks and share the budget.
        parameters: the largest number of trainable parameters.
        lines: names of formats or lines of legs; by default every registered format.

    Returns:
        `RankTable`, the closest format first. ``table.refused`` says why a format has no row: it does not
        fit the modes, `network` refuses it, it takes more parameters at rank 1, or it is hashed and takes
        any number.

    Raises:
        ValueError: a number of parameters below 1, no shape, or an unknown name.

    Example:
        >>> budget((12, 12, 4, 768, 64), 10_000, ["cp", "vera", "lora"])
        format  rank   parameters
        vera    r=208  9,984
        cp      r=11   9,460
        lora: has 73,728 trainable parameters at rank 1
    """
    if isinstance(parameters, bool) or not isinstance(parameters, Integral) or parameters < 1:
        raise ValueError(f"a budget is a number of parameters, 1 or more; found {parameters!r}")
    parameters = int(parameters)
    shapes = _shapes(shape)
    asked = {line: get_format(line) for line in (formats if lines is None else lines)}
    rows, refused = [], {}
    for line, form in asked.items():
        try:
            rows.append(_row(line, form, shapes, parameters))
        except ValueError as error:
            refused[line] = str(error).partition("\n")[0].removesuffix(", in")
    return RankTable(tuple(sorted(rows, key=lambda row: -row.parameters)), refused=refused)


def _shapes(shape: Shapes) -> list[Shape]:
    if not isinstance(shape, Iterable):
        raise TypeError(
            f"a shape must be a tuple or a mapping, or a list of these; found {shape!r}"
        )
    several = not isinstance(shape, Mapping) and all(isinstance(each, Mapping) for each in shape)
    found = [Shape(each) for each in shape] if several else [Shape(shape)]  # type: ignore
    if not found:
        raise ValueError("a budget needs at least one shape; found an empty list")
    return found


def _row(line: str, form: Format, shapes: Sequence[Shape], parameters: int) -> RankRow:
    """Find the ranks of one format.

    Raises:
        ValueError: the format does not fit, takes too many parameters, or takes any number.
    """
    sized = [_SizedLine(form.legs(shape), shape) for shape in shapes]
    for each in sized:
        each.check()
    bonds = sized[0].bonds
    alike = all(each.bonds == bonds for each in sized)

    def count(ranks: Mapping[str, int]) -> int:
        return sum(each.count(ranks) for each in sized)

    def fits(ranks: Mapping[str, int]) -> bool:
        return count(ranks) <= parameters

    every = list(dict.fromkeys(bond for each in sized for bond in each.bonds))
    ones = dict.fromkeys(every, 1)
    if not fits(ones):
        raise ValueError(f"has {count(ones):,} trainable parameters at rank 1")
    equal = _largest(lambda size: fits(dict.fromkeys(every, size)), parameters)
    if not alike:  # a mapping from bonds to ranks would fit one network only
        return RankRow(line, equal, count(dict.fromkeys(every, equal)))

    def limited(ranks: Mapping[str, int]) -> dict[str, int]:
        each_limited = [each.limited(ranks) for each in sized]
        return {bond: max(each[bond] for each in each_limited) for bond in bonds}

    ranks = limited(dict.fromkeys(bonds, equal))
    if not any(term.tied for each in sized for term in each.legs.terms):  # tied bonds stay equal
        ranks = _raised(ranks, fits, limited, parameters)
    return RankRow(line, ranks, count(ranks))


def _raised(
    ranks: dict[str, int],
    fits: Callable[[Mapping[str, int]], bool],
    limited: Callable[[Mapping[str, int]], dict[str, int]],
    most: int,
) -> dict[str, int]:
    """Raise single bonds until none can grow; a bond that grew can let one before it grow."""
    before = None
    while ranks != before:
        before = ranks
        for bond in ranks:
            now = ranks
            size = _largest(lambda n: fits({**now, bond: n}), most)  # noqa: B023
            ranks = limited({**ranks, bond: max(size, ranks[bond])})
    return ranks


@dataclass(frozen=True)
class _SizedLine:
    """A line of legs with the sizes of its modes."""

    legs: Legs
    shape: Shape

    @property
    def bonds(self) -> tuple[str, ...]:
        return tuple(self.legs.bonds(self.shape.modes))

    @cached_property
    def _open(self) -> Shape:
        """The shape, with factors in the place of modes that the line splits."""
        return self.legs.split(self.shape)

    def check(self) -> None:
        self.legs.check(self.shape.modes)
        if self.legs.vectors:
            raise ValueError("takes any number of trainable parameters: the size of its vector")
        sizes = {**self._open, **dict.fromkeys(self.bonds, 1)}
        self.legs.check_tied_sizes(sizes)
        check_full(self.legs, sizes, self.shape.modes)

    def limited(self, ranks: Mapping[str, int]) -> dict[str, int]:
        own = {bond: ranks[bond] for bond in self.bonds}
        return self.legs.limits({**self._open, **own}, self.shape.modes)

    def count(self, ranks: Mapping[str, int]) -> int:
        """Count the trainable parameters."""
        sizes = {**self._open, **self.limited(ranks)}
        own = (term for term in self.legs.terms if not (term.frozen or term.tied))
        return sum(math.prod(sizes[leg] for leg in term.legs) for term in own)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Find the largest integer from 1 to ``most`` that fits, if all smaller ones do."""
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
