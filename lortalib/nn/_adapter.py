"""The adapter: owner of the networks of one fine-tuning, and its life on the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..decomp import Cut, Network
from ._beside import TrainedModules
from ._factors import Bundle, Factors
from ._groups import Group
from ._host import Host, host_of, require_host
from ._lowrank import Reads
from ._names import ATTRIBUTE
from ._share import as_stored, attach, detach
from ._site import Site

if TYPE_CHECKING:
    from os import PathLike


@dataclass(frozen=True)
class AdapterConfig:
    """How an adapter was asked for; written to its file.

    Attributes:
        decomposition: name of the format, or the line of legs.
        alpha: what the user gave.
        scaling: the factor of the tensor in the update, made from alpha.
        dropout: probability of dropping an input feature of the adapter in training.
        gqa: ``"pool"`` or ``"split"``.
        init: name of the start.
        share_residual: whether networks of one stack have one factor for ``in``.
    """

    decomposition: str
    alpha: float
    scaling: float
    dropout: float
    gqa: str
    init: str
    share_residual: bool = False


class Adapter(nn.Module):
    """One fine-tuning of a model: tensor networks, and the projections that take their shares.

    Made by `lortalib.nn.apply` and `lortalib.nn.load`, never by hand. It is a submodule of its model
    (``model.lortalib.<name>``), so it moves, trains and is saved with it; nothing of the model is
    replaced.

    Attributes:
        name: name on the model.
        settings: how it was asked for.
        groups: which sites share which network.
        networks: the networks by name of the group; every trainable number, once.
        active: whether it takes part in the model's forward.
        merged: whether its update stands in the weights instead.
    """

    def __init__(
        self,
        name: str,
        settings: AdapterConfig,
        groups: tuple[Group, ...],
        networks: Mapping[str, Network],
        beside: TrainedModules,
    ) -> None:
        super().__init__()
        self.name = name
        self.config = settings
        self.groups = groups
        self.networks = nn.ModuleDict(networks)
        self.trained_modules = beside
        self.active = False
        self.merged = False
        self._host: list[Host] = []
        self._frozen: list[nn.Parameter] | None = None  # what it stopped from requiring gradients
        self._group_of = {site: group for group in groups for site in group.sites}
        self.reads = Reads()
        self._factors = [
            Factors(group, networks[group.name], settings.scaling, self.reads) for group in groups
        ]

    # What it is

    @property
    def sites(self) -> list[Site]:
        """Every projection that takes a share, ordered by stack, layer and role."""
        return list(self._group_of)

    @property
    def scaling(self) -> float:
        """The factor of the tensor in the update."""
        return self.config.scaling

    @property
    def dropout(self) -> float:
        """Probability of dropping an input feature of the adapter in training."""
        return self.config.dropout

    def count(self, trainable_only: bool = True) -> int:
        """How many numbers the networks hold; modules trained beside them are not counted."""
        numbers = {
            id(tensor): tensor.numel()
            for group in self.groups
            for tensor, term in zip(self.network(group).tensors, self.network(group).legs.terms)
            if not (trainable_only and term.frozen)
        }
        return sum(numbers.values())

    def network(self, group: Group) -> Network:
        """The network of a group."""
        network = self.networks[group.name]
        assert isinstance(network, Network)
        return network

    def pair(self, site: Site) -> Cut:
        """The low-rank pair of a site, before scaling: A (p, width), B (heads*head_dim, p)."""
        group = self._group_of[site]
        return group.pair(self.network(group), site)

    def bundles(self, sites: Sequence[Site]) -> Iterator[tuple[Factors, Bundle]]:
        """The sites of one module by group, with what makes their pairs."""
        for factors in self._factors:
            own = tuple(site for site in sites if self._group_of[site] is factors.group)
            if own:
                yield factors, Bundle(factors.group, own)

    def prepare(self) -> None:
        """To be called once every module has asked for its share."""
        for factors in self._factors:
            factors.prepare()

    def doubt(self) -> None:
        """Compare the parameters before pairs that were made are used again."""
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpoint's repeated forward, within a backward
        for factors in self._factors:
            factors.doubt()

    def delta(self, site: Site | str) -> Tensor:
        """The change of one weight, dense and scaled, in the shape in which the weight is stored.

        Args:
            site: one of `sites`, or its module path.

        Returns:
            A tensor in the dtype of the factors (float32), differentiable.

        Raises:
            KeyError: no such site.
        """
        if isinstance(site, str):
            found = [known for known in self._group_of if known.path == site]
            if not found:
                raise KeyError(
                    f"adapter {self.name!r} has no site {site!r}; the first of its "
                    f"{len(self._group_of)} is {next(iter(self._group_of)).path!r}"
                )
            site = found[0]
        group = self._group_of[site]
        return as_stored(group.dense(self.network(group), site), site) * self.scaling

    # On and off

    @property
    def host(self) -> Host:
        """What the adapters of the model share.

        Raises:
            RuntimeError: the adapter was removed from its model.
        """
        if not self._host:
            raise RuntimeError(
                f"adapter {self.name!r} was removed from its model; apply or load it again"
            )
        return self._host[0]

    def enable(self) -> None:
        """Take part in the forward again (a merged adapter already does).

        Raises:
            ValueError: a module trained beside it is in use by another active adapter.
        """
        if not self.active:
            self.trained_modules.enter(self.host.model, self._others(active=True))
            self.active = True

    def _others(self, active: bool) -> list[TrainedModules]:
        adapters = [adapter for adapter in self.host.adapters() if adapter is not self]
        return [adapter.trained_modules for adapter in adapters if adapter.active or not active]

    def disable(self) -> None:
        """Leave the forward: the model computes what its base does, bit for bit."""
        if self.merged:
            self.unmerge()
        if self.active:
            self.trained_modules.leave(self.host.model)
            self.active = False

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model computes what it would without this adapter."""
        active, merged = self.active, self.merged
        self.disable()
        try:
            yield
        finally:
            if active:
                self.enable()
            if merged:
                self.merge()

    # In the weights

    def merge(self) -> None:
        """Write the update into the base's weights; the forward is then the base's own.

        Raises:
            ValueError: a factor that is not finite, a weight that cannot take the update (quantised,
                or its dtype overflows). Then nothing is changed.
        """
        if self.merged:
            return
        for group in self.groups:
            for name, tensor in self.network(group).named_parameters():
                if not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"factor {name!r} of network {group.name!r} holds NaN or infinity, so adapter "
                        f"{self.name!r} was not merged; nothing was changed"
                    )
        active = self.active
        self.enable()
        self.merged = True
        try:
            self.host.remerge(self.sites)
        except Exception:
            self.merged = False
            self.host.prune()
            if not active:
                self.disable()
            raise
        detach(self.host.model, self)

    def unmerge(self) -> None:
        """Take the update out of the weights; the base gets back every bit."""
        if self.merged:
            self.merged = False
            self.host.remerge(self.sites)
            attach(self.host.model, self)

    def remove(self, *, merged: bool = False) -> None:
        """Take the adapter off its model, which is then as it was before `apply`.

        Args:
            merged: leave the update (and the modules trained beside it) in the weights for good.

        Raises:
            RuntimeError: it was removed already.
            ValueError: ``merged=True`` and the update cannot be merged.
        """
        host = self.host
        if merged:
            self.merge()
            host.settle(self)
        else:
            self.disable()
        if not self.trained_modules.conflict(self._others(active=False)):
            self.trained_modules.set_trainable(host.model, False)
        self._thaw()
        detach(host.model, self)
        self.active = self.merged = False
        del host[self.name]
        self._host = []
        if not len(host):
            host.release()

    def _thaw(self) -> None:
        """Let what this adapter froze require gradients again, unless another keeps it frozen."""
        others = [other for other in self.host.adapters() if other is not self]
        heirs = [other._frozen for other in others if other._frozen is not None]
        if heirs:
            heirs[0].extend(self._frozen or [])
        else:
            for parameter in self._frozen or []:
                parameter.requires_grad_(True)

    # In words

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write ``adapter.safetensors`` and ``adapter.json``; see `lortalib.nn.load`.

        Returns:
            The folder.

        Raises:
            OSError: the folder cannot be written. Files that were there are then as they were.
            ValueError: the factors are on the meta device.
        """
        from ._storage import save

        return save(self, folder)

    def export_lora(self, folder: str | PathLike[str]) -> Path:
        """Write a standard LoRA of PEFT that makes the very same model; see
        `lortalib.nn.export_lora`.

        Returns:
            The folder.

        Raises:
            OSError: the folder cannot be written.
            ValueError: a weight that LoRA has no pair for.
        """
        from ._lora import export_lora

        return export_lora(self, folder)

    def __repr__(self) -> str:
        return describe(self)


def install(adapter: Adapter, model: nn.Module, *, active: bool, freeze: bool) -> None:
    """Put a finished adapter on a model; the one place where `apply` and `load` touch it.

    Raises:
        ValueError: a module trained beside it is in use by another active adapter.
    """
    host = host_of(model)
    others = list(host.adapters()) if host else []
    taken = adapter.trained_modules.conflict(
        other.trained_modules for other in others if other.active
    )
    if active and taken:
        raise ValueError(
            f"{taken!r} is trained by another active adapter and can hold only one's values; "
            "disable that adapter first, or pass active=False"
        )
    host = require_host(model)
    if freeze:
        adapter._frozen = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.startswith(f"{ATTRIBUTE}."):
                parameter.requires_grad_(False)
                adapter._frozen.append(parameter)
        for other in others:
            other.trained_modules.set_trainable(model, True)
    host[adapter.name] = adapter
    adapter._host = [host]
    adapter.train(model.training)
    adapter.trained_modules.set_trainable(model, True)
    attach(model, adapter)
    if active:
        adapter.enable()


def describe(adapter: Adapter) -> str:
    """What was patched, how many numbers, and how many LoRA would need."""
    settings = adapter.config
    host = adapter._host[0] if adapter._host else None
    rows: list[tuple[Any, ...]] = [
        ("stack", "matrices", "layers", "heads", "in", "out", "legs", "ranks", "numbers")
    ]
    rank = 0
    lora = 0
    for group in adapter.groups:
        network = adapter.network(group)
        shape = group.shape
        ranks = network.ranks
        same = len(set(ranks.values())) == 1
        rank = max(rank, max(ranks.values(), default=1))
        lora += sum(site.features + site.width for site in group.sites)
        rows.append(
            (
                group.sites[0].stack,
                " ".join(group.roles),
                shape["layer"],
                shape["head"],
                f"{shape['in']:,}",
                f"{shape['out']:,}",
                str(network.legs),
                next(iter(ranks.values()))
                if same
                else " ".join(f"{b}={n}" for b, n in ranks.items()),
                f"{network.count():,}",
            )
        )
    cells = [[str(cell) for cell in row] for row in rows]
    columns = [max(map(len, column)) for column in zip(*cells)]
    table = [
        "  " + "  ".join(cell.ljust(n) for cell, n in zip(row, columns)).rstrip() for row in cells
    ]
    owner = f" on {type(host.model).__name__}" if host else ", removed from its model"
    state = "merged" if adapter.merged else "active" if adapter.active else "not active"
    count = adapter.count()
    lines = [
        f"Adapter {adapter.name!r}{owner} ({state}): {settings.decomposition}, "
        f"scaling {settings.scaling:g}, dropout {settings.dropout:g}",
        *table,
    ]
    share = ""
    if host:
        base = sum(p.numel() for name, p in host.model.named_parameters() if not _is_ours(name))
        share = f", {100 * count / base:.3g} % of the model's {base:,}"
    lines.append(
        f"  {count:,} trainable numbers{share}; LoRA of rank {rank} on these {len(adapter.sites)} "
        f"projections has {rank * lora:,} ({rank * lora / max(1, count):.3g} times as many)"
    )
    if adapter.trained_modules.paths:
        lines.append(f"  trained beside it: {', '.join(adapter.trained_modules.paths)}")
    return "\n".join(lines)


def _is_ours(name: str) -> bool:
    return name.startswith(f"{ATTRIBUTE}.")
