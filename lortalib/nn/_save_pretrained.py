"""Lets `save_pretrained` of a transformers model with adapters write these as adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from ._adapter import Adapter
from ._anatomy import ATTRIBUTE
from ._host import AdapterHost

_NAME = "save_pretrained"
_FILE = "adapter.safetensors"
_ABOUT = """\
# A fine-tuning as a tensor network

`{files}` {hold} what was trained on `{base}`. The weights of that model are not here.

    import lortalib
    from transformers import {kind}

    model = {kind}.from_pretrained("{base}")
    lortalib.nn.load(model, "FOLDER")  # the folder of that file

`lortalib merge {base} FOLDER OUT` writes an ordinary model with it in the weights, and `lortalib export-lora`
an ordinary LoRA.
"""


class SavePretrained:
    """Stands for ``save_pretrained`` of a model while it has adapters.

    The folder gets the adapters that are not merged: one as ``adapter.safetensors``, several in a folder each
    under their names. The model itself is written beside them, under its ordinary names, if something is
    merged into its weights, if none is left unmerged, or if parameters of its own train.

    Args:
        host: the adapters of the model.
    """

    def __init__(self, host: AdapterHost) -> None:
        self._host = host

    def __call__(self, save_directory: str | PathLike[str], *args: Any, **options: Any) -> Any:
        """Write the model as it has to be saved; takes what ``save_pretrained`` of the model takes.

        Raises:
            ValueError: the folder holds an adapter that would be read beside this model, a factor is not
                finite, or ``push_to_hub`` is asked for.
        """
        model, folder = self._host.model, Path(save_directory)
        unmerged = [adapter for adapter in self._host.adapters() if not adapter.merged]
        places = saved_in(folder, unmerged)
        if folder not in places.values() and (folder / _FILE).exists():
            raise ValueError(
                f"{folder} holds an {_FILE} that is no part of what is to be saved, and would be loaded with "
                "it; give another folder, or remove that file"
            )
        if options.get("push_to_hub"):
            raise ValueError(
                "save_pretrained(push_to_hub=True) is not for models with adapters of lortalib; call "
                "model.push_to_hub(repository), which saves in the same way"
            )
        written = None
        if not unmerged or self._trains_the_base() or len(unmerged) < len(self._host):
            with _without_adapters(model):
                written = getattr(type(model), _NAME)(model, save_directory, *args, **options)
        if (args[0] if args else options.get("is_main_process", True)) and unmerged:
            for adapter in unmerged:
                adapter.save(places[adapter.name])
            _write_about(model, folder, places)
        return written

    def _trains_the_base(self) -> bool:
        """Return True if parameters train that no file of an adapter holds."""
        model = self._host.model
        own = {id(p) for p in self._host.parameters()}
        for adapter in self._host.adapters():
            for path in adapter.trained_modules.paths:
                own |= {id(p) for p in model.get_submodule(path).parameters()}
        return any(p.requires_grad and id(p) not in own for p in model.parameters())


def saved_in(folder: Path, adapters: list[Adapter]) -> dict[str, Path]:
    """Return the folder of each adapter by name: the folder itself for one, subfolders for several.

    Args:
        folder: where a model is saved.
        adapters: its adapters that are not merged.
    """
    if len(adapters) == 1:
        return {adapters[0].name: folder}
    return {adapter.name: folder / adapter.name for adapter in adapters}


def stand_in(model: nn.Module, host: AdapterHost) -> None:
    """Let `SavePretrained` stand for ``save_pretrained`` of a model that has it."""
    if callable(getattr(type(model), _NAME, None)):
        vars(model)[_NAME] = SavePretrained(host)


@contextmanager
def _without_adapters(model: Any) -> Iterator[None]:
    """Within this context transformers leaves the names of the adapters out of what it saves."""
    ignored = "_keys_to_ignore_on_save"  # transformers' own list of such names
    had, before = ignored in vars(model), getattr(model, ignored, None)
    own = {name for name in model.state_dict() if ATTRIBUTE in name.split(".")}
    vars(model)[ignored] = {*(before or ()), *own}
    try:
        yield
    finally:
        if had:
            vars(model)[ignored] = before
        else:
            vars(model).pop(ignored, None)


def _write_about(model: Any, folder: Path, places: dict[str, Path]) -> None:
    """Write the page that a repository shows, unless there is one."""
    page = folder / "README.md"
    if page.exists():
        return
    files = [(place / _FILE).relative_to(folder).as_posix() for place in places.values()]
    text = _ABOUT.format(
        files="`, `".join(files),
        hold="holds" if len(files) == 1 else "hold",
        base=getattr(model.config, "_name_or_path", "") or "MODEL",
        kind=type(model).__name__,
    )
    page.write_text(text, encoding="utf-8")
