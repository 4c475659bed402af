"""Declares the kinds of arguments at public functions, and refuses arguments of another kind before anything
changes. A kind says in words what it is, which the error repeats beside what was found."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from numbers import Integral
from reprlib import repr as short
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Kind(NamedTuple):
    """A kind of argument.

    Attributes:
        what: what the argument must be, in words.
        fits: returns True for an argument of this kind.
    """

    what: str
    fits: Callable[[Any], bool]

    @property
    def or_none(self) -> Kind:
        """The kind that has None besides."""
        return Kind(f"{self.what}, or None", lambda value: value is None or self.fits(value))

    def check(self, name: str, value: object) -> None:
        """Refuse an argument of another kind.

        Args:
            name: what the error calls the argument.
            value: the argument.

        Raises:
            TypeError: the argument is of another kind.
        """
        if not self.fits(value):
            raise TypeError(f"{name} must be {self.what}; found {short(value)}")


def takes(**kinds: Kind) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function refuse arguments of another kind than the one declared for them.

    Args:
        **kinds: the kind of each argument by its name.

    Example:
        >>> @takes(freeze=FLAG)
        ... def apply(model, freeze=True):
        ...     return freeze
        >>> apply("model", freeze="no")
        Traceback (most recent call last):
            ...
        TypeError: apply(): freeze must be True or False; found 'no'
    """

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        owner, _, own = function.__qualname__.rpartition(".")
        called = owner.rpartition(".")[2] if own == "__init__" else own

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = signature.bind_partial(*args, **kwargs).arguments
            except TypeError:  # the call itself says better which argument is missing or too many
                return function(*args, **kwargs)
            for name, kind in kinds.items():
                if name in given:
                    kind.check(f"{called}(): {name}", given[name])
            return function(*args, **kwargs)

        return checked

    return declare


def is_writable(text: str) -> bool:
    """Return True for a text that files can hold: UTF-8 has a form of it, and it has no NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False
    return "\0" not in text


def is_integer(value: object) -> bool:
    """Return True for an integer of any library; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and is_writable(value)


def _is_path(value: object) -> bool:
    if not isinstance(value, (str, os.PathLike)) or value == "":
        return False
    try:
        return b"\0" not in os.fsencode(value)
    except (UnicodeEncodeError, TypeError):
        return False


def _is_device(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        return False
    try:
        torch.device(value)
    except (RuntimeError, ValueError):
        return False
    return True


def are(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a function that is True for a collection of values that fit; a text is no collection of letters.

    An iterator cannot be looked at without using it up, so it does not fit.
    """

    def check(value: object) -> bool:
        listed = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
        return listed and iter(value) is not value and all(map(fits, value))  # type: ignore[call-overload]

    return check


FLAG = Kind("True or False", lambda value: type(value).__name__ in ("bool", "bool_"))
LIST = Kind("a list", are(lambda each: True))
TEXT = Kind("a text that UTF-8 can hold, without NUL", _is_text)
TEXTS = Kind("a list of texts", are(_is_text))
NAMES = Kind("a name, or a list of names", lambda value: _is_text(value) or TEXTS.fits(value))
TOKEN = Kind("a text, True or False", lambda value: FLAG.fits(value) or _is_text(value))
PATH = Kind("a path: a text that is not empty and without NUL, or an os.PathLike", _is_path)
FUNCTION = Kind("a function", callable)
MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping))
INTEGER = Kind("an integer", is_integer)
INTEGERS = Kind(
    "an integer, or a list of integers", lambda value: is_integer(value) or are(is_integer)(value)
)
DTYPE = Kind(
    "a dtype of torch, such as torch.float32", lambda value: isinstance(value, torch.dtype)
)
MODULE = Kind("a torch.nn.Module", lambda value: isinstance(value, torch.nn.Module))
GENERATOR = Kind(
    "a torch.Generator, or None", lambda value: value is None or isinstance(value, torch.Generator)
)
DEVICE = Kind(
    "a device of torch, such as 'cpu' or 'cuda:0', or None",
    lambda value: value is None or _is_device(value),
)
OPTIMIZER = Kind(
    "an optimiser with param_groups and state, such as torch.optim.AdamW(...)",
    lambda value: hasattr(value, "param_groups") and hasattr(value, "state"),
)
