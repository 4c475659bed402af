"""Reads and writes safetensors files: first the header, whose size is limited, later the tensors."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .._sharded import whole
from .folder import LONGEST_TEXT, AdapterFileError, parse_json
from .records import read_record, read_value, short

#: The names of the dtypes that a file may hold.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
#: The dtypes that can be trained.
TRAINABLE = ("F64", "F32", "F16", "BF16")

_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_LONGEST_HEADER = 2 * LONGEST_TEXT
_MOST_TENSORS = 200_000
_MOST_AXES = 64


@dataclass(frozen=True)
class TensorSpec:
    """The description of one tensor in the header of a file.

    Attributes:
        dtype: the name of its dtype, such as ``"F32"``.
        shape: its shape.
    """

    dtype: str
    shape: tuple[int, ...]


class TensorFile:
    """A safetensors file whose header was read; see `open_tensors`.

    Header and tensors are read through one open file. safetensors' own reader opens the path a second
    time for the tensors, and could read them from a file that another process put there meanwhile.

    Attributes:
        path: the path of the file.
        metadata: texts by key.
        specs: dtype and shape of each tensor, by name.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < size <= _LONGEST_HEADER:
            raise ValueError(
                f"its header would have {size:,} bytes, of at most {_LONGEST_HEADER:,}"
            )
        header = parse_json(file.read(size).decode(), _LONGEST_HEADER)
        if not isinstance(header, dict) or len(header) > _MOST_TENSORS:
            raise ValueError(f"its header names no tensors, or more than {_MOST_TENSORS:,}")
        self.metadata: dict[str, str] = read_value(dict[str, str], header.pop("__metadata__", {}))
        entries = {name: read_record(_Entry, entry) for name, entry in header.items()}
        end = _end_of(entries)
        if end != file.seek(0, SEEK_END) - 8 - size:
            raise ValueError("it is shorter or longer than its header says")
        self.specs = {name: TensorSpec(each.dtype, each.shape) for name, each in entries.items()}
        self._starts = {name: 8 + size + each.data_offsets[0] for name, each in entries.items()}

    def read(self) -> dict[str, Tensor]:
        """Read every tensor by name, on the CPU, into its own memory.

        Raises:
            AdapterFileError: a dtype that is not one of `DTYPES`, or the file was cut short meanwhile.
        """
        self.check_types()
        found = {}
        for name, spec in self.specs.items():
            tensor = torch.empty(spec.shape, dtype=_BY_NAME[spec.dtype])
            self._file.seek(self._starts[name])
            if self._file.readinto(_bytes(tensor)) < tensor.nbytes:  # type: ignore[attr-defined]
                raise AdapterFileError(f"{self.path} is damaged or cut short")
            found[name] = tensor
        return found

    def check_types(self) -> None:
        """Refuse dtypes that cannot be checked or trained, such as float8.

        Raises:
            AdapterFileError: a dtype that is not one of `DTYPES`.
        """
        for name, spec in self.specs.items():
            if spec.dtype not in _BY_NAME:
                raise AdapterFileError(
                    f"{self.path}: tensor {name!r} is of type {spec.dtype}; convert it to one of "
                    f"{', '.join(TRAINABLE)}"
                )


@dataclass(frozen=True)
class _Entry:
    """One tensor in the header of a file; its position is counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _end_of(entries: Mapping[str, _Entry]) -> int:
    """Find the end of the last tensor; each tensor must begin where the one before it ends.

    Raises:
        ValueError: a gap, an overlap, or a size that does not follow from shape and dtype.
    """
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        numbers = math.prod(entry.shape) if len(entry.shape) <= _MOST_AXES else -1
        size = _BY_NAME[entry.dtype].itemsize if entry.dtype in _BY_NAME else None
        fits = size is None or stop - start == numbers * size
        if start != end or stop < start or min(entry.shape, default=0) < 0 or not fits:
            raise ValueError(f"tensor {short(name)} does not fit into its place in the file")
        end = stop
    return end


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file, and read its header only.

    Args:
        path: the path of the file.

    Raises:
        AdapterFileError: the file is damaged or cut short, or its header is too long for an adapter's.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "x.safetensors")
        >>> with path.open("wb") as file:
        ...     write_tensors(file, {"a": torch.ones(2, 3)}, {"note": "hello"})
        >>> with open_tensors(path) as file:
        ...     print(file.specs, file.metadata, file.read()["a"].sum())
        {'a': TensorSpec(dtype='F32', shape=(2, 3))} {'note': 'hello'} tensor(6.)
    """
    with path.open("rb") as file:
        try:
            found = TensorFile(path, file)
        except OSError as error:
            raise AdapterFileError(f"{path} cannot be read: {error}") from error
        except ValueError as error:
            raise AdapterFileError(f"{path} is damaged or cut short: {error}") from error
        yield found


def plain(tensor: Tensor) -> Tensor:
    """Bring a tensor into the form that a file takes: whole, contiguous and on the CPU; not a copy if it is.

    Args:
        tensor: any tensor; one that is sharded over processes is gathered, on every process.
    """
    found: Tensor = whole(tensor).detach().cpu().contiguous()
    return found


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file; equal tensors and texts always give equal bytes.

    safetensors itself writes the texts in an order that changes from call to call.

    Args:
        file: a file opened for writing.
        tensors: tensors by name, as `plain` makes them.
        metadata: texts by key.

    Raises:
        ValueError: a dtype that is not one of `DTYPES`.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": dtype_name(name, tensors[name]),
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        file.write(_bytes(tensors[name]))


def dtype_name(name: str, tensor: Tensor) -> str:
    """Return the name of a tensor's dtype.

    Args:
        name: the name of the tensor, for the error message.
        tensor: the tensor.

    Raises:
        ValueError: a dtype that is not one of `DTYPES`.
    """
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} is of {tensor.dtype}, which an adapter's file does not hold; convert it to one "
            f"of {', '.join(TRAINABLE)}"
        )
    return DTYPES[tensor.dtype]


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Compute a SHA-256 over a text and all tensors: names, dtypes, shapes and values.

    Args:
        text: the description of the tensors.
        tensors: tensors by name, as `plain` makes them; their order does not matter.

    Example:
        >>> digest("x", {"a": torch.ones(2)}) == digest("x", {"a": torch.ones(1, 2)})
        False
    """
    names = sorted(tensors)
    listed = [[name, dtype_name(name, tensors[name]), list(tensors[name].shape)] for name in names]
    found = hashlib.sha256(json.dumps([text, listed]).encode())
    for name in names:
        found.update(_bytes(tensors[name]))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity.

    Args:
        tensors: tensors by name, of `DTYPES`.

    Example:
        >>> first_not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])})
        'b'
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None
