"""Defines the result of a compression: one tensor for each group of sites, and the adapters in it."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
from .._task_lines import check_dropout, check_task_names
from .._tasks import TaskAdapter
from .._trained_modules import TrainedModules
from .errors import lines, measure, table, total
from .slices import over_tasks, slice_of

if TYPE_CHECKING:
    from ...decomp import Fit


class Compression:
    """Adapters of one model, compressed into one tensor for each group of sites; `compress` makes it.

    If the tensor has a mode for the adapters, only parameters with this leg belong to one adapter; all
    others are shared. Each adapter is an ordinary one of the same line: the slice at its position. All
    together are one `TaskAdapter`, whose tasks they are.

    Attributes:
        names: the names of the adapters, in the order of the mode.
        mode: the name of the mode that numbers the adapters; empty if there is none.
        joint: whether `save` writes one folder for all adapters.
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
        joint: bool,
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
        self.joint = joint
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

    def task_adapter(self) -> TaskAdapter:
        """Take all adapters together: a `TaskAdapter` that is on no model, whose tasks are the adapters.

        Each task has of its own what carries the mode of the adapters; what they share is there once.

        Returns:
            The `TaskAdapter`, with parameters of its own. ``bank.update`` takes all its tasks.

        Raises:
            ValueError: the adapters cannot be tasks; ``compress(..., joint=True)`` finds out before the fit.
        """
        check_joint(self._trained, self._config.dropout)
        if not self.mode:
            raise ValueError(
                f"the tensor has no mode for adapters, since it holds {self.names[0]!r} alone; take "
                "adapter(), or compress it with joint=True"
            )
        networks = {name: over_tasks(net, self.mode) for name, net in self.networks.items()}
        line = str(networks[self.groups[0].name].legs)
        config = replace(self._config, decomposition=line)
        return TaskAdapter("joint", config, self.groups, networks, TrainedModules(), self.names)

    @takes(folder=PATH)
    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the adapters: a single one to the folder itself, several each to a folder of its name in it.

        `lortalib.nn.load`, `lortalib.nn.read` and a bank read each. Shared parameters are written with
        each adapter, so that none needs the others. If `joint` is true, the folder itself gets all adapters,
        as `task_adapter`: shared parameters are written once, and ``bank.load`` reads it too.

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
            for own, adapter in self._folders():
                save(adapter, whole / own, model=self._model)
            os.replace(whole, out)
        return out

    def _folders(self) -> Iterator[tuple[str, Adapter]]:
        """Yield what is written, with the name of its folder."""
        if self.joint:
            yield ".", self.task_adapter()
            return
        for name in self.names:
            yield name if len(self.names) > 1 else ".", self.adapter(name)

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


def check_joint(trained: Mapping[str, TrainedModules], dropout: float) -> None:
    """Refuse adapters that cannot be the tasks of one.

    Args:
        trained: the modules that train as a whole with each adapter, by its name.
        dropout: the dropout of the compressed adapters.

    Raises:
        ValueError: an adapter has such modules, or the name of no task; or dropout.
    """
    check_task_names(list(trained))
    check_dropout(dropout)
    for name, modules in trained.items():
        if modules.paths:
            raise ValueError(
                f"adapter {name!r} has its own {', '.join(modules.paths)}, trained as a whole, which tasks "
                "have in common; compress without joint=True (--joint), which writes a folder for each"
            )


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds anything.

    Raises:
        FileExistsError: it exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; give another folder")
