"""Saves adapters.

A site is stored by (stack, layer, role) and its sizes. Its module path is only a hint, because
transformers renames paths between versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from torch import Tensor, nn

from ..._kinds import MAPPING, MODULE, PATH, takes
from .._adapter import ADAPTER, Adapter
from .._anatomy import ATTRIBUTE, check_model
from .._sharded import is_divided, is_zero_parameter
from .checks import check_description, check_tensors
from .describe import describe, stored_tensors
from .folder import TENSORS, parse_json, put_files, refuse_bank, remove_old_description
from .saved import write_saved
from .schema import trained_key
from .tensors import TensorSpec, dtype_name, first_not_finite, plain


@takes(adapter=ADAPTER, folder=PATH, state=MAPPING.or_none, model=MODULE.or_none)
def save(
    adapter: Adapter,
    folder: str | PathLike[str],
    state: Mapping[str, Tensor] | None = None,
    model: nn.Module | None = None,
    beside: Mapping[str, Callable[[BinaryIO], None]] | None = None,
) -> Path:
    """Write an adapter to a folder, as one file; see `Adapter.save`.

    Anything that a reader would refuse is refused here, before the first byte is written. If the model
    is sharded over processes (FSDP2), every process has to call this function.

    Args:
        adapter: an adapter.
        folder: the folder; it is made if it does not exist.
        state: the whole state of the model, if this process saves alone what is divided over several.
        model: the model of an adapter that is on none.
        beside: the function that writes each further file, by file name. All files are replaced together.
            Only the folder of a bank has further files.

    Returns:
        The folder.

    Raises:
        OSError: the folder cannot be written. A file that was there stays unchanged.
        AdapterFileError: the folder is that of a bank, and ``beside`` is not given.
        ValueError: a factor, or a value of a trained module, is on the meta device, NaN or infinite; or is
            divided, and ``state`` does not have it.
        RuntimeError: the adapter was removed from its model.

    Example:
        >>> import tempfile, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "cp", rank=2)
        >>> [file.name for file in save(adapter, tempfile.mkdtemp()).iterdir()]
        ['adapter.safetensors']
    """
    model = adapter.model if model is None else check_model(model)
    folder = Path(folder)
    if beside is None:
        refuse_bank(folder)
    place = f"{ATTRIBUTE}.{adapter.name}."
    tensors = {
        key: _numbers(_from_state(tensor, state, place + key), f"{key!r}")
        for key, tensor in stored_tensors(adapter).items()
    }
    own_state = (
        state if adapter.active or state is None else {}
    )  # else the model has the base's values
    for path, values in adapter.trained_modules.values(model).items():
        tensors |= {
            trained_key(path, own): _numbers(
                _from_state(v, own_state, f"{path}.{own}"), f"module {path!r}"
            )
            for own, v in values.items()
        }
    check_numbers(tensors, f"adapter {adapter.name!r} was not saved")
    description = describe(adapter, model)
    text = description.text()
    specs = {k: TensorSpec(dtype_name(k, t), tuple(t.shape)) for k, t in tensors.items()}
    check_tensors(check_description(parse_json(text)), specs)
    put_files(folder, {TENSORS: lambda file: write_saved(file, text, tensors), **(beside or {})})
    remove_old_description(folder)
    return folder


def _from_state(tensor: Tensor, state: Mapping[str, Tensor] | None, name: str) -> Tensor:
    """Take a divided tensor from the state of the model, where one process saves alone: gathering it would
    wait for the others for ever."""
    if state is None or not (is_divided(tensor) or is_zero_parameter(tensor)):
        return tensor
    if name not in state:
        raise ValueError(
            f"{name!r} is divided over processes, and the state dict that is to be saved does not have it; "
            "call adapter.save in every process"
        )
    return state[name]


def _numbers(tensor: Tensor, what: str) -> Tensor:
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device: it has no numbers to save")
    return plain(tensor)


def check_numbers(tensors: Mapping[str, Tensor], outcome: str) -> None:
    """Refuse to write tensors that no reader would accept.

    Args:
        tensors: tensors by name.
        outcome: the end of the error message, which says what was not done.

    Raises:
        ValueError: NaN or infinity, or a dtype that no file holds.
    """
    for name, tensor in tensors.items():
        dtype_name(name, tensor)
    broken = first_not_finite(tensors)
    if broken is not None:
        raise ValueError(
            f"{broken!r} holds NaN or infinity, so {outcome}; nothing was written. Go back to the last "
            "saved state and train with a lower learning rate or with clipped gradients"
        )
