"""Saves adapters, and reads them back, onto a model or without one.

A site is stored by (stack, layer, role) and its sizes. Its module path is only a hint, because
transformers renames paths between versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor, nn

from ..._kinds import FLAG, MAPPING, MODULE, PATH, takes
from ...decomp import Network
from .._adapter import ADAPTER, Adapter
from .._adapters import check_name, install
from .._anatomy import ATTRIBUTE, check_model, site_weight
from .._group import Group
from .._sharded import is_divided, is_zero_parameter
from .._trained_modules import TrainedModules
from .checks import check_description, check_tensors
from .describe import describe, stored_tensors
from .fit import Rules, check_values, fit_groups
from .folder import TENSORS, parse_json, put_files, refuse_bank, remove_old_description
from .saved import make_networks, open_saved, values_in, write_saved
from .schema import Description, trained_key
from .tensors import TensorSpec, dtype_name, first_not_finite, plain
from .weights import SavedModules, shared_weights


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


@takes(active=FLAG, freeze=FLAG)
def load(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    name: str | None = None,
    active: bool = True,
    freeze: bool = True,
    rules: Rules = (),
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Adapter:
    """Put a saved adapter on a model.

    Args:
        model: a model of the same shape as the one the adapter was trained on.
        folder: a folder that `Adapter.save` or PEFT's ``save_pretrained`` wrote, the path of its file, or a
            repository of the Hugging Face hub, ``user/name``. A local path goes before the hub.
        name: the adapter's name on the model; by default the saved one.
        active: whether the adapter takes part in the forward at once.
        freeze: whether all other parameters of the model stop requiring gradients.
        rules: rows that explain a remote-code model, as for `lortalib.nn.sites`.
        revision: a branch, tag or commit of the repository; by default ``main``.
        token: a token of the hub; by default the one that ``hf auth login`` stored.
        subfolder: the folder in the repository, or below a local folder, that has the files.

    Returns:
        The `Adapter`.

    Raises:
        FileNotFoundError: there is no such file, repository or revision.
        ConnectionError: the hub cannot be reached, or ``HF_HUB_OFFLINE`` is set, and the repository was not
            downloaded before.
        AdapterFileError: the file is damaged, or the adapter does not fit the model; the message says
            what differs. The model stays unchanged.
        ValueError: the name is in use.

    Example:
        >>> import tempfile
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> folder = lortalib.nn.apply(model, "cp", rank=2).save(tempfile.mkdtemp())
        >>> load(model, folder, name="again").count()
        100
    """
    if name is not None:
        check_name(model, name)
    adapter = read_adapter(
        model, folder, name=name, rules=rules, revision=revision, token=token, subfolder=subfolder
    )
    if name is None:
        check_name(model, adapter.name)
    install(adapter, model, active=active, freeze=freeze)
    return adapter


def read_adapter(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    name: str | None = None,
    rules: Rules = (),
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    of_bank: bool = False,
) -> Adapter:
    """Read the adapter of a folder and fit it to a model, without putting it on; see `load`.

    Args:
        model, folder, name, rules, revision, token, subfolder: as for `load`.
        of_bank: whether the folder may be that of a bank.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: the hub cannot be reached, and the repository was not downloaded before.
        AdapterFileError: the file is damaged, or the adapter does not fit the model.
        ValueError: a revision is given for a local path.
    """
    model = check_model(model)
    with open_saved(folder, revision, token, subfolder, of_bank=of_bank) as saved:
        groups = fit_groups(model, saved, rules)
        tensors = saved.read()
    networks = make_networks(saved.description, tensors)
    for group in groups:
        weight = site_weight(model, group.sites[0])
        if not weight.is_meta:
            networks[group.name].to(weight.device)
    values = values_in(saved.description, tensors)
    check_values(model, values)
    modules = SavedModules(values, shared_weights(model, saved.description.trained_modules))
    return _make(saved.description, name, tuple(groups), networks, modules)


def read(
    folder: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Adapter:
    """Read the adapter of a folder as it was saved, without a model.

    Its sites are those of the model that it was trained on. Its tensors, low-rank pairs and norms, and
    `export_lora`, work as they do on a model.

    Args:
        folder: a folder that `Adapter.save` or PEFT's ``save_pretrained`` wrote, the path of its file, or a
            repository of the Hugging Face hub, ``user/name``. A local path goes before the hub.
        revision: a branch, tag or commit of the repository; by default ``main``.
        token: a token of the hub; by default the one that ``hf auth login`` stored.
        subfolder: the folder in the repository, or below a local folder, that has the files.

    Returns:
        The `Adapter`, on the CPU.

    Raises:
        FileNotFoundError: there is no such file, repository or revision.
        ConnectionError: the hub cannot be reached, and the repository was not downloaded before.
        AdapterFileError: the file is damaged.

    Example:
        >>> import tempfile, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> folder = lortalib.nn.apply(model, "cp", rank=2).save(tempfile.mkdtemp())
        >>> adapter = read(folder)
        >>> adapter.is_on_model, adapter.count()
        (False, 100)
    """
    with open_saved(folder, revision, token, subfolder) as saved:
        tensors = saved.read()
    description = saved.description
    modules = SavedModules(values_in(description, tensors), description.shared_weights)
    groups = tuple(each.group for each in description.groups)
    networks = make_networks(description, tensors)
    return _make(description, None, groups, networks, modules)


def _make(
    description: Description,
    name: str | None,
    groups: tuple[Group, ...],
    networks: Mapping[str, Network],
    modules: TrainedModules,
) -> Adapter:
    """Make the adapter of a description, under another name if one is given."""
    parts = (
        description.name if name is None else name,
        description.config,
        groups,
        networks,
        modules,
    )
    if not description.tasks:
        return Adapter(*parts)
    from .._tasks import TaskAdapter  # it uses the rows of banks, which have files

    return TaskAdapter(*parts, description.tasks)


def read_description(
    folder: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> dict[str, Any]:
    """Read the description of a saved adapter, after its whole file was checked.

    Args:
        folder: a folder that `Adapter.save` or PEFT's ``save_pretrained`` wrote, the path of its file, or a
            repository of the Hugging Face hub, ``user/name``. A local path goes before the hub.
        revision: a branch, tag or commit of the repository; by default ``main``.
        token: a token of the hub; by default the one that ``hf auth login`` stored.
        subfolder: the folder in the repository, or below a local folder, that has the files.

    Returns:
        The fields that docs/files.md lists, under their names in the present format version.

    Raises:
        FileNotFoundError: there is no such file, repository or revision.
        ConnectionError: the hub cannot be reached, and the repository was not downloaded before.
        AdapterFileError: the file is damaged.

    Example:
        >>> import tempfile, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> folder = lortalib.nn.apply(model, "cp", rank=2, alpha=0.5).save(tempfile.mkdtemp())
        >>> read_description(folder)["config"]["alpha"]
        0.5
    """
    with open_saved(folder, revision, token, subfolder) as saved:
        saved.read()
    return saved.value
