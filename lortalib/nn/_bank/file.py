"""Writes the adapters of a bank to a folder, and reads them back.

The folder has two files. ``adapter.safetensors`` is the file of an adapter that changes nothing: it describes
the networks and contains the shared parameters. ``bank.safetensors`` contains the stacked own tensors.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._adapter import Adapter
from .._anatomy import BlockRule
from .._files import (
    BANK,
    FILES,
    AdapterFileError,
    adapter_file,
    digest,
    open_tensors,
    plain,
    read_adapter,
    save,
    write_tensors,
)
from .._hub import local_folder

_FORMAT = "lortalib bank, version 1"
_NAMES = "names"


class SavedBank(NamedTuple):
    """What the folder of a bank contains.

    Attributes:
        base: the adapter that changes nothing, with the shared parameters.
        names: the names of the adapters.
        own: a mapping from the name of each group to its own tensors, with a leading axis of adapters.
    """

    base: Adapter
    names: list[Hashable]
    own: dict[str, list[Tensor]]


def write_bank(
    folder: str | PathLike[str],
    model: nn.Module,
    base: Adapter,
    names: Sequence[Hashable],
    own: Mapping[str, Sequence[Tensor]],
) -> Path:
    """Write the adapters of a bank.

    Args:
        folder: the folder; it is made if it does not exist.
        model: the model of the bank.
        base, names, own: as in `SavedBank`.

    Raises:
        ValueError: a name that is neither a text nor an integer, or a dtype that no file holds.
        OSError: the folder cannot be written.
    """
    odd = next((name for name in names if type(name) not in (str, int)), None)
    if odd is not None:
        raise ValueError(f"names in a file are texts or integers; found {odd!r}")
    text = json.dumps(list(names)).encode()
    tensors = {_NAMES: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    for group, keys in _keys(base).items():
        for key, stack in zip(keys, own[group]):
            if key not in tensors:
                tensors[key] = plain(stack)
    described = _digest_of(base)
    metadata = {"format": _FORMAT, "adapter": described, "sha256": digest(described, tensors)}
    own_file = {BANK: lambda file: write_tensors(file, tensors, metadata)}
    return save(base, folder, model=model, beside=own_file)


def read_bank(
    folder: str | PathLike[str],
    model: nn.Module,
    rules: BlockRule | Sequence[BlockRule],
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> SavedBank | Adapter:
    """Read what `write_bank` wrote, or an adapter with tasks.

    Args:
        folder: the folder, or a repository of the hub.
        model: the model, to which the adapters are fitted.
        rules: as for `bank`.
        revision, token, subfolder: as for `local_folder`.

    Returns:
        The adapters of a bank, or the adapter with tasks.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterFileError: a file is damaged, the files were not written together, or the adapters do not fit
            the model.
    """
    folder = local_folder(folder, FILES, revision, token, subfolder)
    path = folder / BANK
    if not path.is_file() and adapter_file(folder).is_file():
        adapter = read_adapter(model, folder, rules=rules)
        if adapter.tasks:
            return adapter
        raise FileNotFoundError(
            f"{folder} holds an adapter and no bank: it has no {BANK}. Store it with bank[name] = folder; on "
            "the command line, give it as --adapter NAME=FOLDER"
        )
    base = read_adapter(model, folder, rules=rules, of_bank=True)
    with open_tensors(path) as file:
        metadata, tensors = file.metadata, file.read()
    if metadata.get("format") != _FORMAT:
        raise AdapterFileError(
            f"{path} is not a bank's file of the version that this lortalib reads"
        )
    if metadata.get("adapter") != _digest_of(base):
        raise AdapterFileError(f"{path} was not written together with the other file of its folder")
    if metadata.get("sha256") != digest(metadata["adapter"], tensors):
        raise AdapterFileError(f"{path} is damaged: its SHA-256 is another than the one it has")
    names = _read_names(tensors.pop(_NAMES, None), path)
    keys = _keys(base)
    lost = next((key for each in keys.values() for key in each if key not in tensors), None)
    if lost is not None:
        raise AdapterFileError(f"{path} is damaged: it lacks the tensor {lost!r}")
    own = {group: [tensors[key] for key in each] for group, each in keys.items()}
    return SavedBank(base, names, own)


def read_folder(
    model: nn.Module,
    folder: object,
    rules: BlockRule | Sequence[BlockRule],
    revision: str | None,
    token: str | bool | None,
    subfolder: str | None,
    of_bank: bool = False,
) -> Adapter:
    """Read the adapter of a folder or repository for a bank.

    Args:
        model: the bank's model, to which the adapter is fitted.
        folder, revision, token, subfolder: as for `local_folder`.
        rules: as for `bank`.
        of_bank: whether the folder may be that of a bank.

    Raises:
        TypeError: a source that is no folder, and so has no revision, token or subfolder.
        FileNotFoundError, AdapterFileError: as for `Bank.add`.
    """
    if not isinstance(folder, (str, PathLike)):
        raise TypeError(
            "revision, token and subfolder go with a folder or repository; found a source that is "
            f"of the type {type(folder).__name__}"
        )
    place = {"revision": revision, "token": token, "subfolder": subfolder}
    return read_adapter(model, folder, rules=rules, of_bank=of_bank, **place)  # type: ignore[arg-type]


def _keys(base: Adapter) -> dict[str, list[str]]:
    """Name the stack of each own parameter in the file, by the name of the group and in the order of the
    line. A parameter of several terms or networks is there once, under its first name."""
    first: dict[int, str] = {}
    keys: dict[str, list[str]] = {}
    for group in base.groups:
        network = base.network(group)
        pairs = zip(network.legs.terms, network.stored)
        own = [tensor for term, tensor in pairs if not term.shared]
        keys[group.name] = [
            first.setdefault(id(tensor), f"{group.name}.{k}") for k, tensor in enumerate(own)
        ]
    return keys


def _read_names(stored: Tensor | None, path: Path) -> list[Hashable]:
    """Read the names of the adapters; refuse what `write_bank` does not write."""
    names: Any = None
    if stored is not None and stored.dtype == torch.uint8:
        with suppress(ValueError):
            names = json.loads(stored.numpy().tobytes())
    texts = isinstance(names, list) and all(type(name) in (str, int) for name in names)
    if not texts or len(set(names)) < len(names):
        raise AdapterFileError(
            f"{path} is damaged: its names are to be a list of distinct texts or integers; found "
            f"{str(names)[:200]}"
        )
    return list(names)


def _digest_of(base: Adapter) -> str:
    """Compute a digest of the lines and the parameters of an adapter."""
    networks = {group.name: base.network(group) for group in base.groups}
    lines = json.dumps({name: str(network.legs) for name, network in networks.items()})
    return digest(
        lines,
        {
            f"{name}.{k}": plain(tensor)
            for name, network in networks.items()
            for k, tensor in enumerate(network.stored)
        },
    )
