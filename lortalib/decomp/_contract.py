"""Contraction of named tensors: the arithmetic beneath dense and cut, without any module.

A tensor here is a pair (legs, torch tensor). A leg may stand on any number of tensors; it is summed
once nothing outside the pair being contracted needs it, which covers the bond of CP, shared by all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from itertools import combinations, product
from string import ascii_letters
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Names = tuple[str, ...]
Plan = TypeVar("Plan")


def _constant(function: Callable[..., Plan]) -> Callable[..., Plan]:
    """Cache a pure function of hashable arguments; torch.compile takes its result as a constant."""
    cached = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def call(*args: object) -> Plan:
        return cached(*args)

    return torch.compiler.assume_constant_result(call)  # type: ignore[no-any-return]


@_constant
def contraction_path(
    terms: tuple[Names, ...], output: Names, sizes: tuple[tuple[str, int], ...]
) -> tuple[tuple[int, int, str], ...]:
    """Greedy pairwise order: always the pair whose result adds the fewest numbers.

    Returns:
        Steps ``(i, j, equation)``: tensors i and j leave the list, the result joins at its end.
        A single tensor gives one step with ``i == j``.
    """
    size = dict(sizes)
    letters = dict(zip(size, ascii_letters, strict=False))

    def numel(legs: Names) -> int:
        return math.prod(size[leg] for leg in legs)

    def word(legs: Names) -> str:
        return "".join(letters[leg] for leg in legs)

    left = list(terms)
    if len(left) == 1:
        return ((0, 0, f"{word(left[0])}->{word(output)}"),)
    steps = []
    while len(left) > 1:
        pairs = {pair: _joined(left, pair, output) for pair in combinations(range(len(left)), 2)}
        growth = {
            (i, j): numel(result) - numel(left[i]) - numel(left[j])
            for (i, j), result in pairs.items()
        }
        i, j = min(growth, key=growth.__getitem__)
        steps.append((i, j, f"{word(left[i])},{word(left[j])}->{word(pairs[i, j])}"))
        left = [term for k, term in enumerate(left) if k not in (i, j)] + [pairs[i, j]]
    return tuple(steps)


def _joined(terms: Sequence[Names], pair: tuple[int, int], output: Names) -> Names:
    """The legs of the product of two terms: those that the output or another term still needs."""
    if len(terms) == 2:
        return output
    rest = {leg for k, term in enumerate(terms) if k not in pair for leg in term}
    both = dict.fromkeys(terms[pair[0]] + terms[pair[1]])
    return tuple(leg for leg in both if leg in output or leg in rest)


def contract(
    terms: tuple[Names, ...], tensors: Sequence[Tensor], output: Names, sizes: Mapping[str, int]
) -> Tensor:
    """Sum over every leg that is not in ``output``; the result's axes are those of ``output``."""
    left = list(tensors)
    for i, j, equation in contraction_path(terms, output, tuple(sizes.items())):
        pair = [left[i]] if i == j else [left[i], left[j]]
        left = [tensor for k, tensor in enumerate(left) if k not in (i, j)]
        left.append(torch.einsum(equation, *pair))
    return left[0]


class Partition(NamedTuple):
    """Two sides of a network and the bonds that cross between them."""

    near: tuple[int, ...]
    far: tuple[int, ...]
    bonds: Names


@_constant
def cheapest_cut(
    terms: tuple[Names, ...], sizes: tuple[tuple[str, int], ...], far_modes: Names
) -> Partition:
    """Split the parameters so that ``in`` lies on one side and ``far_modes`` on the other.

    Of all such splits the one with the smallest product of crossing bonds; among equals the one with
    the fewest parameters beside ``in``. A network has few parameters, so all splits are tried.
    A parameter that carries ``in`` and a far mode cannot be split: then ``near`` is empty.
    """
    size = dict(sizes)
    pinned: list[int | None] = []
    for term in terms:
        far = any(mode in term for mode in far_modes)
        if "in" in term and far:
            # No bond separates the two sides: everything is far, and `in` itself is what crosses.
            return Partition((), tuple(range(len(terms))), ("in",))
        pinned.append(0 if "in" in term else 1 if far else None)
    free = [position for position, side in enumerate(pinned) if side is None]
    best: tuple[tuple[int, int], Partition] | None = None
    for choice in product((0, 1), repeat=len(free)):
        side = {**dict(enumerate(pinned)), **dict(zip(free, choice))}
        near = tuple(k for k in side if side[k] == 0)
        rest = tuple(k for k in side if side[k] == 1)
        beyond = {leg for k in rest for leg in terms[k]}
        bonds = tuple(dict.fromkeys(leg for k in near for leg in terms[k] if leg in beyond))
        cost = (math.prod(size[bond] for bond in bonds), len(near))
        if best is None or cost < best[0]:
            best = cost, Partition(near, rest, bonds)
    assert best is not None
    return best[1]
