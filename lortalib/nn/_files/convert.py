"""Converts between the two kinds of folders: that of `Adapter.save` and that of PEFT's `save_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

from torch import Tensor

from ..._kinds import PATH, takes
from .describe import describe_groups, stored_tensors
from .folder import TENSORS, TENSORS_OF_PEFT, put_files
from .load import make_adapter
from .peft_folder import write_peft
from .saved import open_saved, write_saved
from .schema import Description, values_of


@takes(out=PATH)
def convert(
    folder: str | PathLike[str],
    out: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    task: str | None = None,
) -> Path:
    """Write an adapter in the other kind of folder; every number keeps its bits.

    What `Adapter.save` wrote becomes what ``save_pretrained`` of PEFT writes, and the other way round.
    Neither a model nor PEFT is needed.

    Args:
        folder: a folder of either kind, or a repository of the Hugging Face hub, ``user/name``.
        out: the folder to write; it is made if it does not exist.
        revision: a branch, tag or commit of the repository; by default ``main``.
        token: a token of the hub; by default the one that ``hf auth login`` stored.
        subfolder: the folder in the repository, or below a local folder, that has the files.
        task: the name of one task to write alone, if the adapter has several; PEFT has no tasks.

    Returns:
        The folder that was written.

    Raises:
        FileNotFoundError: there is no adapter in ``folder``.
        FileExistsError: ``out`` holds an adapter already.
        AdapterFileError: the file is damaged.
        ValueError: PEFT cannot hold the adapter (packed experts, weights that are read directly, a shared
            factor, a decomposition without a name, several tasks); or a task is asked for, and it has none.
        KeyError: the adapter has other tasks.

    Example:
        >>> import tempfile, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> folder = lortalib.nn.apply(model, "cp", rank=2).save(tempfile.mkdtemp())
        >>> there = convert(folder, tempfile.mkdtemp())
        >>> sorted(file.name for file in there.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
        >>> back = convert(there, tempfile.mkdtemp())
        >>> [file.name for file in back.iterdir()]
        ['adapter.safetensors']
    """
    out = Path(out)
    for name in (TENSORS, TENSORS_OF_PEFT):
        if (out / name).exists():
            raise FileExistsError(f"{out} holds {name} already; give another folder")
    with open_saved(folder, revision, token, subfolder) as saved:
        tensors = saved.read()
    description = saved.description
    if task is not None:
        description, tensors = _of_one_task(description, tensors, task)
    if saved.file.path.name == TENSORS_OF_PEFT:
        text = description.text()
        put_files(out, {TENSORS: lambda file: write_saved(file, text, tensors)})
    else:
        write_peft(description, tensors, out)
    return out


def _of_one_task(
    description: Description, tensors: Mapping[str, Tensor], task: str
) -> tuple[Description, dict[str, Tensor]]:
    """Describe one task alone, and take its tensors out; values of trained modules stay as they are."""
    one = make_adapter(description, tensors, task)
    trained = [k for names in values_of(description, tensors).values() for k in names.values()]
    alone = replace(
        description, name=one.name, config=one.config, groups=describe_groups(one), tasks=()
    )
    return alone, {**stored_tensors(one), **{key: tensors[key] for key in trained}}
