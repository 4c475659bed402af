"""Defines the verbs of an adapter that write its files, to a folder or to the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from .._kinds import FLAG, MAPPING, MODULE, TEXT, TOKEN, takes
from ._adapter_module import AdapterModule
from ._anatomy import unwrapped
from ._base_record import warn_of_changes


class AdapterFiles(AdapterModule):
    """The part of an adapter that writes files. Files know adapters, so their modules are imported late."""

    @takes(model=MODULE.or_none)
    def save(
        self,
        folder: str | PathLike[str],
        *,
        state: Mapping[str, Tensor] | None = None,
        model: nn.Module | None = None,
    ) -> Path:
        """Write the adapter to a folder and return the folder; `lortalib.nn.load` reads it.

        Args:
            folder: the folder, which is made if it does not exist.
            state: the model's whole state dict, if one process saves alone what is divided over several.
            model: the model of an adapter that is on none, such as one that was taken out of a bank.

        Raises:
            OSError: the folder cannot be written. Files in it are then unchanged.
            AdapterFileError: the folder is that of a bank.
            RuntimeError: the adapter is on no model, and no model is given.
            TypeError: an argument of another kind.
            ValueError: the factors are on the meta device, NaN or infinite; or ``model`` is another one than
                the adapter is on.
        """
        from ._files import save

        if self._host and model is not None and unwrapped(model) is not self._host[0].model:
            raise ValueError(
                f"adapter {self.name!r} is on a model, whose modules it saves; leave out model="
            )
        if self._host or model is None:
            host = self.require_host()
            host.prepare_files(self)
            warn_of_changes(host)
        return save(cast(Any, self), folder, state, model)

    def export_lora(self, folder: str | PathLike[str], *, task: str | None = None) -> Path:
        """Write a standard LoRA of PEFT with the same updates; see `lortalib.nn.export_lora`.

        Args:
            folder: the folder, which is made if it does not exist.
            task: the task of an adapter with several; by default the one that is chosen.

        Raises:
            OSError: the folder cannot be written.
            FileExistsError: the folder holds an adapter of lortalib in PEFT's form.
            ValueError: PEFT's LoRA has no low-rank pair for one of the weights; or tasks, as for
                `lortalib.nn.export_lora`.
            KeyError: the adapter has other tasks.
        """
        from ._files import export_lora

        if self._host:
            self._host[0].prepare_files(self)
        return export_lora(cast(Any, self), folder, task=task)

    @takes(
        repository=TEXT,
        private=FLAG.or_none,
        revision=TEXT.or_none,
        token=TOKEN.or_none,
        message=TEXT,
        base_model=TEXT.or_none,
        data=TEXT.or_none,
        scores=MAPPING.or_none,
        lora=FLAG,
        replace_card=FLAG,
    )
    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        message: str = "Upload an adapter of lortalib",
        base_model: str | None = None,
        data: str | None = None,
        scores: Mapping[str, float | str] | None = None,
        lora: bool = False,
        replace_card: bool = False,
    ) -> str:
        """Upload the adapter with a model card to a repository of the Hugging Face hub, in one commit.

        ``lortalib.nn.load(model, repository)`` reads it. The card says what the adapter was trained on, its
        format, rank and number of trainable parameters, and how it is loaded with and without lortalib.

        If the model is divided over processes, call `save` in each, and upload the folder from one of them.

        Args:
            repository: ``user/name``; it is made if it does not exist.
            private: whether a new repository is private; by default what the user or organisation has set.
            revision: the branch, which is made if it does not exist; by default ``main``.
            token: a token of the hub that may write; by default the one that ``hf auth login`` stored.
            message: the message of the commit.
            base_model: the name of the model on the card; by default the model's own.
            data: the training data, in words for the card.
            scores: what was measured, by name, for the card.
            lora: whether the same updates are uploaded as an ordinary LoRA too, in the folder ``lora``, so
                that PEFT loads them without lortalib.
            replace_card: whether a README.md in the repository is replaced; otherwise it stays.

        Returns:
            The address of the commit.

        Raises:
            ValueError: the name has another form than ``user/name``, or as for `save` and `export_lora`.
                Nothing was uploaded.
            FileNotFoundError: the token may not see or write the repository.
            ConnectionError: the hub cannot be reached, or ``HF_HUB_OFFLINE`` is set.
            RuntimeError: the adapter was removed from its model.
        """
        from ._card import model_card
        from ._hub import upload

        with tempfile.TemporaryDirectory() as aside:
            folder = self.save(aside)
            if lora:
                self.export_lora(folder / "lora")
            card = model_card(
                {"adapter.safetensors": cast(Any, self)},
                repository,
                base_model=base_model,
                data=data,
                scores=scores,
                lora="lora" if lora else None,
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
            return upload(
                folder,
                repository,
                message=message,
                private=private,
                revision=revision,
                token=token,
                replace_card=replace_card,
            )
