"""Refuses arguments of a wrong kind at the public functions, where the errors can name them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import Tensor

from .._kinds import Kind
from ._tensor_network import TensorNetwork

P = ParamSpec("P")
R = TypeVar("R")


#: The kind of an argument that is a network.
NETWORK = Kind(
    "a network, such as cp(shape, rank) makes", lambda value: isinstance(value, TensorNetwork)
)


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


def check_values(tensors: Iterable[Tensor], what: str) -> None:
    """Refuse tensors on the meta device, which have shapes alone.

    Args:
        tensors: the tensors.
        what: what is to be computed, for the error message.

    Raises:
        ValueError: a tensor is on the meta device.
    """
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"a tensor on the meta device has no numbers, and {what} needs them; make it on another device"
        )
