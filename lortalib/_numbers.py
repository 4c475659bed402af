"""Refuses arguments that are no numbers, or numbers out of range, by the name of the argument."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str, value: Any, *, least: float, is_integer: bool = False, above: bool = False
) -> None:
    """Refuse an argument that is no number, or too small, or not finite.

    Args:
        name: the name of the argument.
        value: what was given.
        least: the smallest number allowed.
        is_integer: whether only integers are allowed.
        above: whether ``least`` itself is not allowed.

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
    if not (number > least if above else number >= least) or not math.isfinite(number):
        bound = f"above {least}" if above else f"at least {least}"
        raise ValueError(f"{name} must be finite and {bound}; found {value!r}")
