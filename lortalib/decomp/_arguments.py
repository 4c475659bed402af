"""Refuses arguments of a wrong kind at the public functions, where the errors can name them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from ._tensor_network import TensorNetwork

P = ParamSpec("P")
R = TypeVar("R")


def takes_network(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function refuse a first argument that is no network.

    Raises:
        TypeError: what was given instead.
    """
    first = next(iter(inspect.signature(function).parameters))

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = args[0] if args else kwargs.get(first, first)
        if not isinstance(given, TensorNetwork) and (args or first in kwargs):
            raise TypeError(
                f"{function.__name__} takes a network, such as cp(shape, rank) makes; found "
                f"{type(given).__name__}. `fit` makes a network of a dense tensor"
            )
        return function(*args, **kwargs)

    return checked


def check_finite(net: TensorNetwork, what: str) -> None:
    """Refuse a network with a parameter that is not finite.

    Args:
        net: the network.
        what: what is to be computed, for the error message.

    Raises:
        ValueError: the name of the parameter.
    """
    for name, tensor in zip(net.names, net.stored):
        if not tensor.is_meta and not bool(tensor.detach().isfinite().all()):
            raise ValueError(
                f"parameter {name!r} holds NaN or infinity, and {what} needs finite numbers, in\n"
                f"    {net.legs}\nGo back to numbers from before the step that made it so"
            )


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
    number = float(value)
    if not (number > least if above else number >= least) or not math.isfinite(number):
        bound = f"above {least}" if above else f"at least {least}"
        raise ValueError(f"{name} must be finite and {bound}; found {value!r}")


def check_ranks(rank: Any) -> None:
    """Refuse ranks that are not integers: one, several, or by bond.

    Raises:
        TypeError: a rank that is no integer.
    """
    named = rank.items() if isinstance(rank, Mapping) else [("", rank)]
    if isinstance(rank, Sequence) and not isinstance(rank, str):
        named = [("", each) for each in rank]
    for bond, size in named:
        if isinstance(size, bool) or not isinstance(size, Integral):
            what = f"the rank of bond {bond!r}" if bond else "rank"
            raise TypeError(f"{what} must be an integer; found {size!r}")
