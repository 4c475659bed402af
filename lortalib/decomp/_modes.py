"""Names the modes of an update tensor, and gives each one a size in a `Shape`."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Union

#: All reserved mode names, in the order of T. A leg with one of these names is never a bond.
MODES = ("task", "layer", "expert", "head", "matrix", "in", "out")


#: The modes of LoRTA's tensor T; a tuple of five sizes is read in this order.
LORTA_MODES = ("layer", "head", "matrix", "in", "out")


ShapeLike = Union["Shape", Mapping[str, Union[int, Sequence[int]]], Sequence[int]]


class Shape(Mapping[str, int]):
    """A shape: the sizes of named modes, in the order of the tensor's axes; immutable and hashable.

    Args:
        sizes: either five integers, read as ``(layer, head, matrix, in, out)``, or a mapping
            from mode names to sizes, whose order is the order of the axes. A tuple instead of a size splits
            the mode: its factors, the slowest first.

    Raises:
        ValueError: a tuple without exactly five entries, or a size below 1.
        TypeError: a size that is not an integer.

    Example:
        >>> Shape((12, 12, 4, 768, 64))
        Shape({'layer': 12, 'head': 12, 'matrix': 4, 'in': 768, 'out': 64})
        >>> Shape({"layer": 2, "in": 8, "out": 8}).numel
        128
        >>> Shape({"in": (8, 12, 8), "out": 8})["in"]
        768
    """

    __slots__ = ("_factors", "_sizes")

    def __init__(self, sizes: ShapeLike) -> None:
        named: dict[str, int | Sequence[int]]
        if isinstance(sizes, Shape):
            named = {**sizes, **sizes.factors}
        elif isinstance(sizes, Mapping):
            named = dict(sizes)
        else:
            if not isinstance(sizes, Iterable):
                raise TypeError(f"a shape is a tuple or a mapping; found {type(sizes).__name__}")
            listed = tuple(sizes)
            if len(listed) != len(LORTA_MODES):
                raise ValueError(
                    f"a shape given as a tuple has {len(LORTA_MODES)} sizes, {LORTA_MODES}; found "
                    f"{len(listed)}: {listed}. For other modes give a mapping from names to sizes, "
                    "for instance {'layer': 12, 'in': 768, 'out': 768}."
                )
            named = dict(zip(LORTA_MODES, listed))
        unnamed = [mode for mode in named if not isinstance(mode, str)]
        if unnamed:
            raise TypeError(f"the modes of a shape have texts as names; found {unnamed[0]!r}")
        self._factors = {
            mode: tuple(_integer(mode, factor) for factor in size)
            for mode, size in named.items()
            if isinstance(size, Sequence) and not isinstance(size, str)
        }
        self._sizes = {
            mode: math.prod(self._factors[mode]) if mode in self._factors else _integer(mode, size)
            for mode, size in named.items()
        }

    def __getitem__(self, mode: str) -> int:
        return self._sizes[mode]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __hash__(self) -> int:
        return hash(tuple(self._sizes.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and list(self.items()) == list(other.items())

    def __repr__(self) -> str:
        return f"Shape({ ({**self._sizes, **self._factors})!r})"

    @property
    def factors(self) -> dict[str, tuple[int, ...]]:
        """The sizes of the factors of each mode that is split, the slowest first."""
        return dict(self._factors)

    @property
    def split(self) -> Shape:
        """The shape over the factors: each mode that is split is replaced by them.

        Example:
            >>> Shape({"in": (8, 12), "out": 5}).split
            Shape({'in.1': 8, 'in.2': 12, 'out': 5})
        """
        sizes: dict[str, int] = {}
        for mode, size in self._sizes.items():
            own = self._factors.get(mode)
            sizes |= {f"{mode}.{k}": n for k, n in enumerate(own, 1)} if own else {mode: size}
        return Shape(sizes)

    @property
    def modes(self) -> tuple[str, ...]:
        """The mode names, in the order of the axes."""
        return tuple(self._sizes)

    @property
    def numel(self) -> int:
        """The number of entries of the full tensor."""
        return math.prod(self._sizes.values())


def _integer(mode: str, size: object) -> int:
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"the size of mode {mode!r} must be an integer; found {size!r}")
    if operator.index(size) < 1:
        raise ValueError(f"the size of mode {mode!r} must be at least 1; found {size}")
    if operator.index(size) >= 2**63:
        raise ValueError(f"the size of mode {mode!r} must fit 64 bits; found {size}")
    return operator.index(size)
