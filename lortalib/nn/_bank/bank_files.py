"""Copies adapters out of a bank, and writes and reads the folder of one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from os import PathLike
from pathlib import Path

from torch import Tensor

from ..._kinds import takes
from .._adapter import Adapter
from .._plan import share_input_factor
from .._trained_modules import TrainedModules
from .contents import NAME, BankContents
from .file import read_bank, write_bank
from .shared import check_same_marks


class BankFiles(BankContents):
    """The contents of a bank, which can be copied out and saved."""

    @takes(name=NAME)
    def adapter(self, name: Hashable) -> Adapter:
        """Copy an adapter out of the bank, as an ordinary one that is on no model.

        ``adapter.save(folder, model=model)`` and ``lortalib.nn.export_lora(adapter, folder, model)`` write
        it, and `lortalib.nn.load` puts it on a model.

        Args:
            name: its name in the bank; None gives an adapter that changes nothing.

        Raises:
            KeyError: the name is not in the bank.

        Example:
            >>> import lortalib, torch
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
            ...                              num_attention_heads=4, intermediate_size=64))
            >>> bank = lortalib.nn.bank(model, "cp", rank=2, shared=("in", "out"))
            >>> bank["ann"] = {"encoder": [torch.ones_like(t) for t in bank[None]["encoder"]]}
            >>> adapter = bank.adapter("ann")
            >>> adapter.name, adapter.is_on_model, adapter.count()
            ('ann', False, 100)
        """
        return self._adapter(name, self._store.snapshot([name]))

    def _adapter(self, name: Hashable, found: Mapping[str, Sequence[Tensor]]) -> Adapter:
        """Make an adapter on no model of a snapshot of one adapter."""
        tensors = {
            group: [t if mark.shared else t[0] for t, mark in zip(ts, self.legs[group].terms)]
            for group, ts in found.items()
        }
        networks, wide = {}, self._shared.dtype
        for group in self.groups:
            like = self._plan.networks[group.name]
            # Copies, so that no adapter has a parameter of the bank.
            own = [tensor.detach().to(wide, copy=True) for tensor in tensors[group.name]]
            networks[group.name] = like.like([own[k] for k in like.legs.holders])
        config = self._plan.config
        if config.share_residual:
            share_input_factor(self.groups, networks)
        return Adapter(str(name), config, self.groups, networks, TrainedModules())

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write all adapters, and the parameters that they share, to a folder; `load` reads them.

        Args:
            folder: the folder, which is made if it does not exist.

        Returns:
            The folder.

        Raises:
            ValueError: a name that is neither a text nor an integer, or a float8 bank.
            OSError: the folder cannot be written.
        """
        now = self._store.moment()
        return write_bank(
            folder, self._home.model, self._adapter(None, now.base), now.names, now.own
        )

    def load(
        self,
        folder: str | PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
    ) -> None:
        """Store the adapters that a bank of this shape saved, replacing adapters of the same names.

        Args:
            folder: a folder that `save` wrote; or the folder of an adapter with tasks, each of which becomes
                an adapter of its name; or a repository of the Hugging Face hub with such files.
            revision: a branch, tag or commit of the repository; by default ``main``.
            token: a token of the hub; by default the one that ``hf auth login`` stored.
            subfolder: the folder in the repository, or below a local folder, that has the files.

        Raises:
            FileNotFoundError: a file of the folder is missing.
            ConnectionError: the hub cannot be reached, and the repository was not downloaded before.
            AdapterFileError: a file is damaged, or its adapters do not fit the model.
            ValueError: they have other groups, legs, shapes or shared parameters than this bank.

        Example:
            >>> import lortalib, tempfile
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
            ...                              num_attention_heads=4, intermediate_size=64))
            >>> bank = lortalib.nn.bank(model, "cp", rank=2, shared=("in", "out"))
            >>> bank.update({"ann": bank[None], "bob": bank[None]})
            >>> again = lortalib.nn.bank(model, "cp", rank=2, shared=("in", "out"))
            >>> again.load(bank.save(tempfile.mkdtemp()))
            >>> list(again)
            ['ann', 'bob']
        """
        saved = read_bank(folder, self._home.model, self._rules, revision, token, subfolder)
        if isinstance(saved, Adapter):
            self.update(saved)
            return
        base = self._reader.read("the folder", saved.base)
        legs = {group.name: saved.base.network(group).legs for group in saved.base.groups}
        check_same_marks("the saved bank", legs, self._reader.legs)
        own = self._reader.scaled(saved.own, saved.base.scaling)
        stacked = self._reader.read_stacked(saved.names, own)
        self._store.put(saved.names, stacked, shared=base.shared)
