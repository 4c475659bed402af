"""Splits modes into factors: ``in`` is the row-major product of the legs ``in.1``, ``in.2`` and so on.

A mode that is no leg of a line is the product of its factors. So the network is an ordinary one over the
factors, which all algorithms see, and the mode is a reshape of adjacent axes of what it is contracted to.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache

from ._einsum import compile_constant
from ._notation import LegsError

#: A mode that is split without a given number of factors gets factors of about this size.
USUAL_FACTOR = 16


def mode_of(leg: str) -> str:
    """Return the mode that a factor belongs to, or the name itself.

    Example:
        >>> mode_of("in.2"), mode_of("in")
        ('in', 'in')
    """
    return leg.partition(".")[0]


@compile_constant
def open_legs(modes: tuple[str, ...], legs: tuple[str, ...]) -> tuple[str, ...]:
    """Replace each mode that is none of the legs by its factors; one without factors stays.

    Example:
        >>> open_legs(("layer", "in"), ("in.2", "in.1", "layer", "r"))
        ('layer', 'in.1', 'in.2')
    """
    found = list[str]()
    for mode in modes:
        own = [leg for leg in dict.fromkeys(legs) if mode != leg and mode == mode_of(leg)]
        found += [mode] if mode in legs or not own else sorted(own, key=_place)
    return tuple(found)


def product(sizes: Sequence[int]) -> int:
    """Multiply sizes; torch.compile can follow it, unlike `math.prod`."""
    result = 1
    for size in sizes:
        result *= size
    return result


def is_factor(leg: str) -> bool:
    """Return True if a leg is a factor of a mode."""
    return "." in leg


def _place(leg: str) -> int:
    return int(leg.partition(".")[2])


def wrong_factor(modes: Iterable[str], legs: Collection[str]) -> tuple[str, str] | None:
    """Find a factor that is out of place, and say why; None if there is none.

    Args:
        modes: the modes of the tensor, whole or split.
        legs: all legs of the line.
    """
    modes = set(modes)
    for leg in filter(is_factor, legs):
        mode = mode_of(leg)
        if leg in modes:
            continue
        if mode not in modes:
            return leg, f"{leg!r} is a factor of {mode!r}, which is no mode of the tensor"
        if mode in legs:
            return leg, f"{mode!r} stands whole, and split as {leg!r}; write one of the two"
        own = open_legs((mode,), tuple(legs))
        if [_place(factor) for factor in own] != list(range(1, len(own) + 1)):
            return leg, (
                f"the factors of {mode!r} are to be numbered {mode}.1, {mode}.2 and so on, the slowest "
                f"first; found {', '.join(own)}"
            )
    return None


def sizes_of_factors(
    mode: str,
    size: int,
    legs: Sequence[str],
    in_line: Mapping[str, int],
    in_shape: Sequence[int] | None,
) -> tuple[int, ...]:
    """Find the sizes of the factors of a mode: given ones, and for the others the most balanced ones.

    Args:
        mode: the mode.
        size: its size.
        legs: its factors, or the mode itself where it is whole.
        in_line: the sizes that the line gives to factors.
        in_shape: the sizes that the shape gives, if it splits the mode.

    Raises:
        LegsError: sizes that disagree or do not multiply to that of the mode, or a size that has not so many
            factors above 1.
    """
    if in_shape is not None and len(in_shape) != len(legs):
        raise LegsError(
            f"the shape splits {mode!r} into {_product(in_shape)}, and the line has {' '.join(legs)}; "
            f"write {' '.join(f'{mode}.{k + 1}' for k in range(len(in_shape)))} in the line, or give the "
            "shape another number of factors"
        )
    if legs == (mode,):
        return (size,)
    if in_shape is not None:
        shaped = dict(zip(legs, in_shape))
        other = [leg for leg in legs if in_line.get(leg, shaped[leg]) != shaped[leg]]
        if other:
            raise LegsError(
                f"the line gives {other[0]!r} the size {in_line[other[0]]}, the shape {shaped[other[0]]}"
            )
        in_line = shaped
    known = math.prod(in_line[leg] for leg in legs if leg in in_line)
    free = [leg for leg in legs if leg not in in_line]
    if size % known or (not free and size != known):
        given = [in_line[leg] for leg in legs if leg in in_line]
        value = f" = {known}" if len(given) > 1 else ""
        raise LegsError(
            f"the factors of {mode!r} are to multiply to its size {_primes(size)}; found "
            f"{_product(given)}{value}. Nothing is padded"
        )
    rest = size // known
    chosen = balanced(rest, len(free)) if free else ()
    if chosen is None:
        primes = prime_factors(rest)
        padded = [*primes, *[1] * len(free)]
        raise LegsError(
            f"{mode!r} has the size {_primes(rest)}, which has no {len(free)} factors above 1; split it into "
            f"at most {max(1, len(primes))}, or give the sizes, of which some may be 1, as in "
            f"{' '.join(f'{leg}:{n}' for leg, n in zip(free, padded))}. Nothing is padded"
        )
    found = {**in_line, **dict(zip(free, chosen))}
    return tuple(found[leg] for leg in legs)


@lru_cache(maxsize=4096)
def balanced(size: int, number: int, least: int = 2) -> tuple[int, ...] | None:
    """Write a size as a product of so many factors with the smallest sum, in ascending order.

    Args:
        size: the size.
        number: how many factors.
        least: the smallest factor allowed.

    Returns:
        The factors, or None if there are not so many above 1.

    Example:
        >>> balanced(768, 3), balanced(4096, 3), balanced(7, 2)
        ((8, 8, 12), (16, 16, 16), None)
    """
    if number == 1:
        return (size,) if size >= least or least == 2 else None
    best = None
    factor = least
    while factor**number <= size:
        rest = balanced(size // factor, number - 1, factor) if size % factor == 0 else None
        if rest is not None and (best is None or factor + sum(rest) < sum(best)):
            best = (factor, *rest)
        factor += 1
    return best


def usual_factors(size: int) -> tuple[int, ...]:
    """Split a size into balanced factors of about 16 or less, as far as it has factors.

    Example:
        >>> usual_factors(768), usual_factors(64), usual_factors(13), usual_factors(1009)
        ((8, 8, 12), (8, 8), (13,), (1009,))
    """
    number = 1
    while USUAL_FACTOR**number < size:
        number += 1
    found = balanced(size, max(1, min(number, len(prime_factors(size)))))
    assert found is not None
    return found


def prime_factors(size: int) -> list[int]:
    """List the prime factors of a number, each as often as it divides the number.

    Example:
        >>> prime_factors(12)
        [2, 2, 3]
    """
    found, factor = [], 2
    while factor * factor <= size:
        while size % factor == 0:
            found.append(factor)
            size //= factor
        factor += 1
    return [*found, size] if size > 1 else found


def _primes(size: int) -> str:
    primes = prime_factors(size)
    return f"{size} = {_product(primes)}" if len(primes) > 1 else f"{size}"


def _product(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
