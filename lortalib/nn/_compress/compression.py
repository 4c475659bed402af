"""Defines the result of a compression: one tensor for each group of sites, and the adapters in it."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..._kinds import FLAG, PATH, takes
from ...decomp import Network, get_format
from .._adapter import Adapter
from .._config import AdapterConfig
from .._files import Lora, save
from .._group import Group
from .._table import network_table
from .errors import lines, measure, table, total
from .slices import slice_of

if TYPE_CHECKING:
    from ...decomp import Fit


class Compression:
    """Adapters of one model, compressed into one tensor for each group of sites; `compress` makes it.

    If the tensor has a mode for the adapters, only parameters with this leg belong to one adapter; all
    others are shared. Each adapter is an ordinary one of the same line: the slice at its position.

    Attributes:
        names: the names of the adapters, in the order of the mode.
        mode: the name of the mode that numbers the adapters; empty if there is none.
        groups: the groups of sites.
        fits: the fit of each group's tensor, by the name of the group; ``fits[name].network`` is the
            tensor. Its error also counts how far the copies of a pooled key/value head differ.
        errors: the error of each adapter at each site, measured on the weights' updates.

    Example:
        >>> import lortalib, tempfile
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                              intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "cp", rank=2, init="normal", name="ann")
        >>> folder = adapter.save(tempfile.mkdtemp())
        >>> found = lortalib.nn.compress(model, {"ann": folder}, "tucker", rank=4)
        >>> found.names, found.mode, list(found.networks), found.error < 1
        (('ann',), '', ['encoder'], True)
    """

    def __init__(
        self,
        model: nn.Module,
        originals: Mapping[str, Lora],
        groups: Sequence[Group],
        fits: Mapping[str, Fit],
        config: AdapterConfig,
        mode: str,
    ) -> None:
        self._model, self._config = model, config
        self._trained = {name: lora.trained_modules for name, lora in originals.items()}
        self._original_count = sum(
            side.numel()
            for lora in originals.values()
            for pair in lora.pairs.values()
            for side in pair
        )
        self.names = tuple(originals)
        self.mode = mode
        self.groups = tuple(groups)
        self.fits = dict(fits)
        self.errors = tuple(measure(map(self.adapter, self.names), originals))

    @property
    def networks(self) -> dict[str, Network]:
        """The tensor of each group, by the name of the group."""
        return {name: found.network for name, found in self.fits.items()}

    @property
    def error(self) -> float:
        """The norm of all differences over the norm of all original updates."""
        return total(self.errors)

    def table(self, by: str) -> list[dict[str, Any]]:
        """Sum the errors up by ``"adapter"``, ``"layer"``, ``"matrix"`` or ``"head"``.

        Args:
            by: what each row is about.

        Returns:
            Rows with four entries: the name, under ``by``; ``"norm"``, the norm of the original update;
            ``"error"``, the norm of the difference; and ``"relative"``, the second over the first, None
            where the original update is zero.

        Raises:
            ValueError: another word.
        """
        return table(self.errors, by)

    @takes(trainable_only=FLAG)
    def count(self, trainable_only: bool = True) -> int:
        """Count the parameters of the tensors, with those of all adapters.

        Args:
            trainable_only: whether parameters marked ``(frozen)`` are left out.
        """
        return sum(network.count(trainable_only) for network in self.networks.values())

    def original_count(self) -> int:
        """Count the parameters of the low-rank pairs that were compressed."""
        return self._original_count

    def adapter(self, name: str | None = None) -> Adapter:
        """Take one adapter out of the tensor: an ordinary `Adapter` that is on no model.

        Args:
            name: one of `names`; not needed if there is one only.

        Returns:
            The `Adapter`, with parameters of its own. A bank takes it as it is; `save` and
            `lortalib.nn.load` bring it onto a model.

        Raises:
            KeyError: no such adapter.
        """
        if name is None and len(self.names) == 1:
            name = self.names[0]
        if name not in self.names:
            raise KeyError(f"no adapter {name!r}; this holds {', '.join(map(repr, self.names))}")
        place, line = self.names.index(name), self._config.decomposition
        networks = {
            group: slice_of(network, self.mode, place, line)
            for group, network in self.networks.items()
        }
        config = replace(self._config, decomposition=self._name_of_line(networks))
        trained = copy.deepcopy(self._trained[name])
        return Adapter(name, config, self.groups, networks, trained)

    @takes(folder=PATH)
    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the adapters: a single one to the folder itself, several each to a folder of its name in it.

        `lortalib.nn.load`, `lortalib.nn.read` and a bank read each. Shared parameters are written with
        each adapter, so that none needs the others.

        Args:
            folder: a folder that does not exist, or is empty.

        Returns:
            The folder.

        Raises:
            FileExistsError: the folder is not empty.
            OSError: it cannot be written; nothing is then left of it.
        """
        out = Path(folder)
        check_empty(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".compressing-") as aside:
            # One renaming at the end, so that the folder is never half written.
            whole = Path(aside, "adapters")
            for name in self.names:
                own = whole / name if len(self.names) > 1 else whole
                save(self.adapter(name), own, model=self._model)
            os.replace(whole, out)
        return out

    def _name_of_line(self, networks: Mapping[str, Network]) -> str:
        """Return the name of the format if it has the line of the networks, else their line."""
        form = get_format(self._config.decomposition)
        found = [str(network.legs) for network in networks.values()]
        known = [str(form.legs(network.shape)) for network in networks.values()]
        return form.name if form.name and found == known else found[0]

    def __repr__(self) -> str:
        count, before = self.count(), self.original_count()
        head = (
            f"Compression of {', '.join(self.names)} to {self._config.decomposition}: {count:,} parameters "
            f"for {before:,} ({before / max(1, count):.3g} times as many), relative error {self.error:.3g}"
        )
        kinds = ("adapter", "matrix") if self.mode else ("matrix",)
        tables = [line for kind in kinds for line in lines(self.table(kind))]
        return "\n".join([head, *network_table(self.groups, self.networks), *tables])


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds anything.

    Raises:
        FileExistsError: it exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; give another folder")
