"""Reads saved adapters, onto a model or without one."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from ..._kinds import FLAG, takes
from ...decomp import Network
from .._adapter import Adapter
from .._adapters import check_name, install
from .._anatomy import check_model, site_weight
from .._group import Group
from .._trained_modules import TrainedModules
from .fit import Rules, check_values, fit_groups
from .saved import make_networks, open_saved, values_in
from .schema import Description
from .weights import SavedModules, shared_weights


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
    task: str | None = None,
) -> Adapter:
    """Put a saved adapter on a model.

    Args:
        model: a model of the same shape as the one the adapter was trained on.
        folder: a folder that `Adapter.save` or PEFT's ``save_pretrained`` wrote, the path of its file, or a
            repository of the Hugging Face hub, ``user/name``. A local path goes before the hub.
        name: the adapter's name on the model; by default the saved one, or that of the task.
        active: whether the adapter takes part in the forward at once.
        freeze: whether all other parameters of the model stop requiring gradients.
        rules: rows that explain a remote-code model, as for `lortalib.nn.sites`.
        revision: a branch, tag or commit of the repository; by default ``main``.
        token: a token of the hub; by default the one that ``hf auth login`` stored.
        subfolder: the folder in the repository, or below a local folder, that has the files.
        task: the name of one task, if the adapter has several and one is to be taken alone, as by
            `TaskAdapter.task`; by default all of them.

    Returns:
        The `Adapter`.

    Raises:
        FileNotFoundError: there is no such file, repository or revision.
        ConnectionError: the hub cannot be reached, or ``HF_HUB_OFFLINE`` is set, and the repository was not
            downloaded before.
        AdapterFileError: the file is damaged, or the adapter does not fit the model; the message says
            what differs. The model stays unchanged.
        ValueError: the name is in use; a task is asked for, and the adapter has none.
        KeyError: the adapter has other tasks.

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
        model,
        folder,
        name=name,
        rules=rules,
        revision=revision,
        token=token,
        subfolder=subfolder,
        task=task,
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
    task: str | None = None,
    of_bank: bool = False,
) -> Adapter:
    """Read the adapter of a folder and fit it to a model, without putting it on; see `load`.

    Args:
        model, folder, name, rules, revision, token, subfolder, task: as for `load`.
        of_bank: whether the folder may be that of a bank.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: the hub cannot be reached, and the repository was not downloaded before.
        AdapterFileError: the file is damaged, or the adapter does not fit the model.
        ValueError: a revision is given for a local path; a task is asked for, and the adapter has none.
        KeyError: the adapter has other tasks.
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
    return _make(saved.description, name, tuple(groups), networks, modules, task)


def read(
    folder: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    task: str | None = None,
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
        task: the name of one task, if the adapter has several and one is to be taken alone, as by
            `TaskAdapter.task`; by default all of them.

    Returns:
        The `Adapter`, on the CPU.

    Raises:
        FileNotFoundError: there is no such file, repository or revision.
        ConnectionError: the hub cannot be reached, and the repository was not downloaded before.
        AdapterFileError: the file is damaged.
        ValueError: a task is asked for, and the adapter has none.
        KeyError: the adapter has other tasks.

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
        return make_adapter(saved.description, saved.read(), task)


def make_adapter(
    description: Description, tensors: Mapping[str, Tensor], task: str | None
) -> Adapter:
    """Make the adapter of a file as it was saved, on no model; or of one of its tasks.

    Args:
        description: the description in the file.
        tensors: the tensors by their present names.
        task: as for `read`.

    Raises:
        ValueError, KeyError: as for `read`.
    """
    modules = SavedModules(values_in(description, tensors), description.shared_weights)
    groups = tuple(each.group for each in description.groups)
    networks = make_networks(description, tensors)
    return _make(description, None, groups, networks, modules, task)


def _make(
    description: Description,
    name: str | None,
    groups: tuple[Group, ...],
    networks: Mapping[str, Network],
    modules: TrainedModules,
    task: str | None,
) -> Adapter:
    """Make the adapter of a description, or of one of its tasks, under another name if one is given."""
    parts = (
        description.name if name is None else name,
        description.config,
        groups,
        networks,
        modules,
    )
    if description.tasks:
        from .._tasks import TaskAdapter  # it uses the rows of banks, which have files

        found: Adapter = TaskAdapter(*parts, description.tasks)
    else:
        found = Adapter(*parts)
    if task is not None:
        found = found.task(task)
        found.name = found.name if name is None else name
    return found


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
