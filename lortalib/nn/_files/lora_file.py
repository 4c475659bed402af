"""Reads the files of a LoRA of PEFT: the pairs of its modules, and all other tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .folder import AdapterFileError
from .lora_config import CONFIG, WEIGHTS, Scaling, lora_config, sealed_text
from .tensors import TRAINABLE, TensorFile, TensorSpec, digest, first_not_finite, open_tensors

_VERSION, _SEAL = "lortalib", "lortalib_sha256"

_PREFIX = "base_model.model."
_KEY = re.compile(r"^(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


class LowRank(NamedTuple):
    """The low-rank pair of one module, ``dW = b @ a``.

    Attributes:
        a: (r, features read).
        b: (features written, r), with the scaling multiplied in.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class LoraFile:
    """A LoRA whose configuration and header were read; see `open_lora`.

    Attributes:
        config: the configuration that `lora_config` returned.
        shapes: (features written, features read) of each adapted module, by its path.
        others: dtype and shape of each tensor that belongs to no pair, by its name in the model.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int]]
    others: Mapping[str, TensorSpec]
    _file: TensorFile
    _sides: Mapping[str, Mapping[str, str]]
    _keys: Mapping[str, str]

    def read(self) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
        """Read the pairs by the path of their module, and the other tensors by their name in the model.

        Raises:
            AdapterFileError: NaN or infinity, or values that are not those that `export_lora` wrote.
        """
        path, tensors, metadata = self._file.path, self._file.read(), self._file.metadata
        # One of the two keys is still there where the other was damaged.
        ours = not {_VERSION, _SEAL}.isdisjoint(metadata)
        if ours and metadata not in _possible_metadata(metadata, self.config, tensors):
            raise AdapterFileError(
                f"{path} and {CONFIG} beside it are not as lortalib wrote them: damaged, of two exports, "
                "or edited. Export again, or save the tensors without metadata"
            )
        broken = first_not_finite(tensors)
        if broken is not None:
            raise AdapterFileError(f"{path}: tensor {broken!r} holds NaN or infinity")
        scaling = Scaling(self.config)
        pairs = {}
        for name, sides in self._sides.items():
            a, b = (tensors[sides[side]].float() for side in "AB")
            b = b * scaling(name, len(a))
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise AdapterFileError(f"{path}: the scaled pair of {name} is beyond float32")
            pairs[name] = LowRank(a, b)
        return pairs, {name: tensors[key] for name, key in self._keys.items()}


def sealed_metadata(
    version: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Make the metadata of an exported LoRA, with a digest of all on which its pairs depend.

    Args:
        version: of the library that exports it.
        config: its configuration.
        tensors: its tensors by name.
    """
    return _sealed(version, f"{version}\n{sealed_text(config)}", tensors)


def _sealed(version: str, text: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {"format": "pt", _VERSION: version, _SEAL: digest(text, tensors)}


def _possible_metadata(
    found: Mapping[str, str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[dict[str, str]]:
    """The metadata that a sound file with this version can have: at first the digest left the version out."""
    version = found.get(_VERSION, "")
    return [
        sealed_metadata(version, config, tensors),
        _sealed(version, sealed_text(config), tensors),
    ]


@contextmanager
def open_lora(folder: str | PathLike[str]) -> Iterator[LoraFile]:
    """Open a LoRA: read and check its configuration and the header of its weights.

    Args:
        folder: a folder that `export_lora` or PEFT wrote.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterFileError: a file is damaged, or contains something other than low-rank pairs.
    """
    config = lora_config(folder)
    path = Path(folder, WEIGHTS)
    if not path.is_file():
        raise FileNotFoundError(
            f"no {WEIGHTS} in {folder}; a LoRA of PEFT is a folder with {CONFIG} and {WEIGHTS}"
        )
    with open_tensors(path) as file:
        file.check_types()
        sides, keys = _sorted_keys(file)
        shapes = {name: _shape(file, name, each) for name, each in sides.items()}
        others = {name: file.specs[key] for name, key in keys.items()}
        yield LoraFile(config, shapes, others, file, sides, keys)


def _sorted_keys(file: TensorFile) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Sort the keys: those of pairs by module and side, all others by their name in the model."""
    sides: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for key, spec in file.specs.items():
        name = key.removeprefix(_PREFIX)
        match = _KEY.match(name)
        if match and len(spec.shape) == 2:
            if spec.dtype not in TRAINABLE:
                raise AdapterFileError(
                    f"{file.path}: {key!r} is of {spec.dtype}, no pair's numbers"
                )
            owner, own = sides.setdefault(match["path"], {}), match["side"]
        elif ".lora_" in key:
            raise AdapterFileError(
                f"tensor {key!r} in {file.path} is no side of a linear map's pair (shape "
                f"{spec.shape}); embeddings, convolutions and DoRA cannot be read"
            )
        else:
            owner, own = others, name
        if own in owner:
            raise AdapterFileError(
                f"{file.path} holds {owner[own]!r} and {key!r}, which are the same"
            )
        owner[own] = key
    if not sides:
        raise AdapterFileError(f"{file.path} holds no pair of a LoRA")
    return sides, others


def _shape(file: TensorFile, name: str, sides: Mapping[str, str]) -> tuple[int, int]:
    """Return (features written, features read) of one pair."""
    a, b = (file.specs[sides[side]].shape if side in sides else (0, 0) for side in "AB")
    if not 0 < a[0] == b[1]:
        raise AdapterFileError(f"the pair of {name} in {file.path} is not whole")
    return b[0], a[1]
