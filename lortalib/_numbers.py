"""Refuses arguments that are no numbers, or numbers out of range, by the name of the argument."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str,
    value: Any,
    *,
    least: float,
    is_integer: bool = False,
    above: bool = False,
    infinite: bool = False,
) -> None:
    """Refuse an argument that is no number, or NaN, or too small, or infinite.

    Args:
        name: the name of the argument.
        value: what was given.
        least: the smallest number allowed.
        is_integer: whether only integers are allowed.
        above: whether ``least`` itself is not allowed.
        infinite: whether infinity is allowed.

    Raises:
        TypeError: no number, or no integer.
        ValueError: a number out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral if is_integer else Real):
        kind = "an integer" if is_integer else "a number"
        raise TypeError(f"{name} must be {kind}; found {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer that no float holds
        number = math.inf
    is_large = number > least if above else number >= least  # not if it is NaN
    if not is_large or not (infinite or math.isfinite(number)):
        bound = ("" if infinite else "finite and ") + ("above" if above else "at least")
        raise ValueError(f"{name} must be {bound} {least}; found {value!r}")
