"""Reads dataclasses from JSON values, and checks every field and its type."""

from __future__ import annotations

import reprlib
import sys
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def read_record(cls: type[Record], value: Any) -> Record:
    """Make the dataclass that a JSON object describes.

    A missing field gets its default, so old files stay valid if a later version adds a field with a
    default. A field that the class does not have is refused, because it would be ignored.

    Args:
        cls: a dataclass of numbers, texts, truth values, tuples (lists in JSON), dictionaries and other
            such dataclasses.
        value: the parsed JSON value.

    Raises:
        ValueError: a value that is not an object, an unknown field, a missing field without a default,
            or a value of another type.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Point:
        ...     at: tuple[float, ...]
        ...     name: str = "no name"
        >>> read_record(Point, {"at": [1, 2.5]})
        Point(at=(1.0, 2.5), name='no name')
        >>> read_record(Point, {"at": [], "colour": 3})
        Traceback (most recent call last):
            ...
        ValueError: unknown field 'colour' of Point
    """
    if not isinstance(value, dict):
        raise ValueError(f"{cls.__name__} is {short(value)}, no object")
    known = _fields_of(cls)  # type: ignore[arg-type]
    unknown = next((key for key in value if key not in known), None)
    if unknown is not None:
        raise ValueError(f"unknown field {short(unknown)} of {cls.__name__}")
    found = {}
    for name, (hint, required) in known.items():
        if name in value:
            try:
                found[name] = _read(hint, value[name])
            except TypeError:
                raise ValueError(
                    f"field {name!r} of {cls.__name__} is {short(value[name])}"
                ) from None
        elif required:
            raise ValueError(f"field {name!r} of {cls.__name__} is missing")
    return cls(**found)


def read_value(hint: Any, value: Any) -> Any:
    """Make the value of a declared type that a JSON value describes; see `read_record`.

    Args:
        hint: the declared type.
        value: the parsed JSON value.

    Raises:
        ValueError: a value of another type.
    """
    try:
        return _read(hint, value)
    except TypeError:
        raise ValueError(f"found {short(value)}") from None


def short(value: Any) -> str:
    """Return the beginning of a value as Python writes it, for an error message."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@lru_cache(maxsize=32)
def _fields_of(cls: Any) -> dict[str, tuple[Any, bool]]:
    """Return the type of each field, and whether the field is required."""
    hints = get_type_hints(cls)
    return {
        field.name: (
            hints[field.name],
            field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(cls)
    }


def _read(hint: Any, value: Any) -> Any:
    """Make a value of a declared type.

    Raises:
        TypeError: a value of another type.
        ValueError: a record inside it is refused.
    """
    if hint is str or hint is bool:
        if type(value) is not hint:
            raise TypeError
        return value
    if hint is int:
        if type(value) is not int:
            raise TypeError
        return value
    if hint is float:
        if type(value) not in (int, float) or abs(value) > sys.float_info.max:
            raise TypeError
        return float(value)
    return _read_compound(hint, value)


def _read_compound(hint: Any, value: Any) -> Any:
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        others = [part for part in parts if part is not NoneType]
        return None if value is None and NoneType in parts else _read(others[0], value)
    if kind is tuple:
        if not isinstance(value, list):
            raise TypeError
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(parts) != len(value):
            raise TypeError
        return tuple(_read(part, each) for part, each in zip(parts, value))
    if kind is dict:
        if not isinstance(value, dict):
            raise TypeError
        return {key: _read(parts[1], each) for key, each in value.items()}
    assert is_dataclass(hint), hint
    return read_record(hint, value)  # type: ignore[arg-type]
