"""Opens the file of an adapter, of any format version: first its description, later its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any, BinaryIO

from torch import Tensor, nn

from ...decomp import Network
from .._hub import local_folder
from .checks import check_description, check_tensors
from .folder import (
    DESCRIPTION,
    FILES,
    TENSORS_OF_PEFT,
    AdapterFileError,
    adapter_file,
    parse_json,
    read_json,
    refuse_bank,
)
from .peft_folder import read_peft
from .schema import FORMAT, FORMAT_VERSION, Description, values_of
from .tensors import TensorFile, digest, first_not_finite, open_tensors, write_tensors
from .upgrades import NewerFormatError, upgrade

_TEXT, _DIGEST = "lortalib", "sha256"
_METADATA = {"format", _TEXT, _DIGEST}


@dataclass(frozen=True)
class SavedAdapter:
    """An opened adapter file, checked except for the values of its tensors.

    Attributes:
        file: the tensors, not yet read.
        value: the description as parsed from JSON, upgraded to the present version.
        description: the same, checked and as a dataclass.
        names: the name in the file of each tensor, by its present name.
    """

    file: TensorFile
    value: dict[str, Any]
    description: Description
    names: Mapping[str, str]

    def read(self) -> dict[str, Tensor]:
        """Read every tensor by its present name; check the digest, and that all values are finite.

        Raises:
            AdapterFileError: the file was changed after it was written, or holds NaN or infinity.
        """
        tensors, metadata = self.file.read(), self.file.metadata
        if _TEXT in metadata and digest(metadata[_TEXT], tensors) != metadata[_DIGEST]:
            raise AdapterFileError(
                f"{self.file.path} is damaged: its SHA-256 is another than the one it was written "
                "with. Copy it again from where it is sound"
            )
        broken = first_not_finite(tensors)
        if broken is not None:
            raise AdapterFileError(f"{self.file.path}: tensor {broken!r} holds NaN or infinity")
        return {name: tensors[old] for name, old in self.names.items()}


@contextmanager
def open_saved(
    folder: str | PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    *,
    of_bank: bool = False,
) -> Iterator[SavedAdapter]:
    """Open a saved adapter: read and check its header. Its tensors are read on request.

    Args:
        folder: a folder that `Adapter.save` wrote, the path of the file in it, or a repository of the hub.
        revision, token, subfolder: as for `local_folder`.
        of_bank: whether the folder may be that of a bank.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: the hub cannot be reached.
        AdapterFileError: the file is damaged, or of a newer format version; or the folder is a bank's.
        ValueError: a revision is given for a local path.
    """
    path = adapter_file(local_folder(folder, FILES, revision, token, subfolder))
    if not of_bank:
        refuse_bank(path.parent)
    with open_tensors(path) as file:
        file.check_types()
        try:
            if path.name == TENSORS_OF_PEFT:
                value, keys = read_peft(path, file.specs)
            else:
                value, keys = _description_of(file), {name: name for name in file.specs}
            value, names = upgrade(value, keys)
            description = check_description(value)
            check_tensors(description, {name: file.specs[old] for name, old in names.items()})
        except AdapterFileError:
            raise
        except NewerFormatError as error:
            raise AdapterFileError(f"{path} {error}") from error
        except ValueError as error:
            raise AdapterFileError(f"{path} is damaged: {error}") from error
        yield SavedAdapter(file, value, description, names)


def _description_of(file: TensorFile) -> dict[str, Any]:
    """Read the description from a file's metadata; in version 1, from ``adapter.json``."""
    if not file.metadata.keys() - {"format"}:
        beside = file.path.with_name(DESCRIPTION)
        if not beside.is_file():
            raise ValueError("it describes no adapter of lortalib")
        return _of_version(beside.name, read_json(beside), beside=True)
    text = file.metadata.get(_TEXT)
    if text is None:
        raise ValueError("it describes no adapter of lortalib")
    value = _of_version("its description", parse_json(text), beside=False)
    if value.get("format_version") == FORMAT_VERSION and (
        set(file.metadata) != _METADATA or file.metadata["format"] != "pt"
    ):
        raise ValueError("its metadata is not what lortalib writes")
    return value


def _of_version(where: str, value: Any, beside: bool) -> dict[str, Any]:
    """Return the description if it stands where its version keeps it: in version 1 in ``adapter.json``, in
    later ones in the file."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"{where} does not describe a lortalib adapter")
    version = value.get("format_version")
    if type(version) is int and 1 <= version <= FORMAT_VERSION and beside != (version == 1):
        raise ValueError(f"{where} is of format version {version}, which keeps it elsewhere")
    return value


def write_saved(file: BinaryIO, text: str, tensors: Mapping[str, Tensor]) -> None:
    """Write the file of an adapter.

    Args:
        file: a file opened for writing.
        text: the description.
        tensors: the tensors by name.
    """
    metadata = {"format": "pt", _TEXT: text, _DIGEST: digest(text, tensors)}
    write_tensors(file, tensors, metadata)


def make_networks(description: Description, tensors: Mapping[str, Tensor]) -> dict[str, Network]:
    """Make the networks, by the name of their group; a shared parameter is one object in all of them.

    Args:
        description: the description in the file.
        tensors: the tensors by their present names.
    """
    networks: dict[str, Network] = {}
    owners: dict[str, nn.Parameter] = {}
    for saved in description.groups:
        values = [tensors[key] for key in saved.keys_in_file()]
        network = Network(saved.line, values, tuple(saved.modes), sizes=saved.sizes)
        for name, key in zip(network.names, saved.keys_in_file()):
            network.register_parameter(name, owners.setdefault(key, network.get_parameter(name)))
        networks[saved.name] = network
    return networks


def values_in(
    description: Description, tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Collect the values of the modules that were trained as a whole, by path and name in the module.

    Args:
        description: the description in the file.
        tensors: the tensors by their present names.
    """
    return {
        path: {own: tensors[key] for own, key in names.items()}
        for path, names in values_of(description, tensors).items()
    }
