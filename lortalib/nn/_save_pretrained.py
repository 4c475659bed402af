"""Makes `save_pretrained` of a transformers model write the model's adapters to adapter files."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from ._adapter import Adapter
from ._anatomy import ATTRIBUTE
from ._base_record import base_is_written
from ._card import model_card
from ._host import AdapterHost
from ._own_folder import own_folder

_NAME = "save_pretrained"
_FILE = "adapter.safetensors"
#: Whether the Trainer that is saving reads adapters when it resumes.
_reads_adapters = ContextVar("_reads_adapters", default=False)


class SavePretrained:
    """Replaces ``save_pretrained`` of a model while the model has adapters.

    It writes every adapter that is not merged: a single adapter as ``adapter.safetensors``, several adapters
    each to a subfolder of its name. It also writes the model itself, to the usual files, if an adapter is
    merged into its weights, if parameters of the base train, or if the base has changed since its first
    adapter was applied, as by ``resize_token_embeddings``.

    Args:
        host: the host of the model's adapters.
    """

    def __init__(self, host: AdapterHost) -> None:
        self._host = host

    def __call__(self, save_directory: str | PathLike[str], *args: Any, **options: Any) -> Any:
        """Save the adapters, and the model if needed, with the arguments of the model's ``save_pretrained``.

        Raises:
            ValueError: the folder contains another adapter that would be read together with this model, a
                factor is not finite, or ``push_to_hub`` is given.
        """
        model, folder = self._host.model, Path(save_directory)
        save = getattr(type(model), _NAME)
        asked = {
            "is_main_process": True,
            **inspect.signature(save).bind(model, save_directory, *args, **options).arguments,
            **options,
        }
        unmerged = [adapter for adapter in self._host.adapters() if not adapter.merged]
        places = saved_in(folder, unmerged)
        if folder not in places.values() and (folder / _FILE).exists():
            raise ValueError(
                f"{folder} holds an {_FILE} that is no part of what is to be saved, and would be loaded with "
                "it; give another folder, or remove that file"
            )
        if asked.get("push_to_hub"):
            raise ValueError(
                "save_pretrained(push_to_hub=True) is not for models with adapters of lortalib; call "
                "model.push_to_hub(repository), which saves in the same way"
            )
        written = None
        with_base = (
            not unmerged
            or len(unmerged) < len(self._host)
            or self._trains_the_base()
            or bool(self._host.changed_base())
        )
        if with_base:
            with _without_adapters(model):
                written = save(model, save_directory, *args, **options)
        if asked["is_main_process"] and unmerged:
            files = {places[each.name] / _FILE: each for each in unmerged}
            card = _card(folder, files, with_base)
            with base_is_written() if with_base else nullcontext():
                for adapter in unmerged:
                    adapter.save(places[adapter.name], state=asked.get("state_dict"))
            page = folder / "README.md"
            if not page.exists():
                page.write_text(card, encoding="utf-8")
            if re.fullmatch(r"checkpoint-\d+", folder.name) and not _reads_adapters.get():
                warnings.warn(
                    "this Trainer cannot resume from its checkpoints, nor load the best one at the end: it "
                    "does not read adapter.safetensors. Put the mixin of lortalib before its class: "
                    "class AdapterTrainer(lortalib.nn.AdapterTrainerMixin, Trainer): pass",
                    stacklevel=2,
                )
        return written

    def _trains_the_base(self) -> bool:
        """Return True if parameters of the model train that no adapter file contains."""
        model = self._host.model
        own = {id(p) for p in self._host.parameters()}
        for adapter in self._host.adapters():
            for path in adapter.trained_modules.paths:
                own |= {id(p) for p in model.get_submodule(path).parameters()}
        return any(p.requires_grad and id(p) not in own for p in model.parameters())


def saved_in(folder: Path, adapters: list[Adapter]) -> dict[str, Path]:
    """Return the folder of each adapter by name: the folder itself for one, subfolders for several.

    Args:
        folder: the folder that a model is saved to.
        adapters: the adapters of the model that are not merged.
    """
    if len(adapters) == 1:
        return {adapters[0].name: folder}
    return {adapter.name: own_folder(folder, adapter.name) for adapter in adapters}


@contextmanager
def by_a_trainer_that_reads_adapters() -> Iterator[None]:
    """Let `SavePretrained` know within a context that a Trainer saves which can resume from adapter files."""
    token = _reads_adapters.set(True)
    try:
        yield
    finally:
        _reads_adapters.reset(token)


def stand_in(model: nn.Module, host: AdapterHost) -> None:
    """Replace ``save_pretrained`` of a model, if the model has it, by `SavePretrained`."""
    if callable(getattr(type(model), _NAME, None)):
        vars(model)[_NAME] = SavePretrained(host)


@contextmanager
def _without_adapters(model: Any) -> Iterator[None]:
    """Leave the adapters' parameters out of the files that the model writes within a context."""
    ignored = "_keys_to_ignore_on_save"  # transformers does not save parameters of these names
    if not hasattr(type(model), ignored):  # diffusers saves every parameter
        modules = dict(model._modules)
        try:
            model._modules.pop(ATTRIBUTE, None)
            yield
        finally:
            model._modules.clear()
            model._modules.update(modules)
        return
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


def _card(folder: Path, adapters: dict[Path, Adapter], with_base: bool) -> str:
    """Return the text of README.md, the page that a repository shows."""
    named = {file.relative_to(folder).as_posix(): each for file, each in adapters.items()}
    return model_card(named, with_base=with_base)
