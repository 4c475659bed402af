"""The adapter: tensor networks, and the projections that they update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from ..decomp import Cut, Network, TensorNetwork
from ._adapter_module import AdapterModule
from ._anatomy import Site
from ._carrier import Host
from ._config import AdapterConfig
from ._forward import PairSource
from ._group import Group
from ._sharded import divide_again, whole, whole_network
from ._table import describe
from ._trained_modules import TrainedModules


class Adapter(AdapterModule):
    """One fine-tuning of a model: tensor networks, and the projections that they update.

    Made by `lortalib.nn.apply` and `lortalib.nn.load`, never by hand. It is a submodule of its model
    (``model.lortalib.<name>``), so it moves, trains and is saved with it; nothing of the model is
    replaced. A call that changes its state and fails leaves model and adapter as they were.

    Attributes:
        name: name on the model.
        config: how it was asked for.
        groups: which sites share which network.
        networks: the networks by name of the group; every trainable parameter, once.
        active: whether it takes part in the model's forward.
        merged: whether its update stands in the weights instead.
    """

    def __init__(
        self,
        name: str,
        config: AdapterConfig,
        groups: tuple[Group, ...],
        networks: Mapping[str, Network],
        trained_modules: TrainedModules,
    ) -> None:
        sources = [PairSource(g, networks[g.name], config.scaling) for g in groups]
        super().__init__(networks, sources, trained_modules)
        self.name = name
        self.config = config
        self.groups = groups
        self._sources = sources

    # What it is

    @property
    def sites(self) -> list[Site]:
        """Every projection that is updated, ordered by stack, layer and role."""
        return [site for group in self.groups for site in group.sites]

    @property
    def sources(self) -> Sequence[PairSource]:
        """What makes the low-rank pairs, one for each group."""
        return self._sources

    @property
    def scaling(self) -> float:
        """The factor of the tensor in the update."""
        return self.config.scaling

    @property
    def dropout(self) -> float:
        """Probability of dropping an input feature of the adapter in training."""
        return self.config.dropout

    def count(self, trainable_only: bool = True) -> int:
        """How many parameters the networks have; modules trained as a whole are not counted.

        Args:
            trainable_only: whether parameters marked ``(frozen)`` are left out.
        """
        numbers = {
            id(tensor): tensor.numel()
            for group in self.groups
            for tensor, term in zip(self.network(group).stored, self.network(group).legs.terms)
            if not (trainable_only and term.frozen)
        }
        return sum(numbers.values())

    def network(self, group: Group) -> Network:
        """The network of a group."""
        network = self.networks[group.name]
        assert isinstance(network, Network)
        if "_hf_hook" in network.__dict__:  # accelerate has seen it, and may have offloaded it
            self.bring_back()
        return network

    def _whole(self, group: Group) -> TensorNetwork:
        """The network of a group, gathered where it is divided over processes."""
        self._reshard()
        return whole_network(self.network(group))

    def _reshard(self) -> None:
        """Let FSDP2 divide what it gathered for forwards, which may be rounded."""
        if self.is_on_model and self.scope.running is None:
            divide_again(self.model)

    def snapshot(self) -> Adapter:
        """The adapter with the numbers that its networks have now, on no model and without the modules
        that train with it. Where it is divided over processes, every process has to call it."""
        networks = {}
        for group in self.groups:
            network = self.network(group)
            self._reshard()
            networks[group.name] = network.like([whole(t).detach().clone() for t in network.stored])
        return Adapter(self.name, self.config, self.groups, networks, TrainedModules())

    def low_rank_pair(self, site: Site | str) -> Cut:
        """The low-rank pair of a site, before scaling: A (p, width), B (heads*head_dim, p).

        Args:
            site: one of `sites`, or its module path.

        Raises:
            KeyError: no such site.
        """
        group, site = self._find(site)
        return group.pair(self._whole(group), site)

    def delta(self, site: Site | str, weight: Tensor | None = None) -> Tensor:
        """The change of one weight, dense and scaled, in the shape in which the weight is stored.

        Args:
            site: one of `sites`, or its module path.
            weight: of the base, as stored, for an adapter that acts on the stream; that of its model by
                default.

        Returns:
            A tensor in the dtype of the factors (float32), also under autocast; differentiable.

        Raises:
            KeyError: no such site.
            ValueError: the adapter acts on the stream, and is on no model.
        """
        group, site = self._find(site)
        if group.on_stream:
            weight = self.base_weight(site) if weight is None and self.is_on_model else weight
            weight = whole(weight)
        return group.delta(self._whole(group), site, weight) * self.scaling

    def base_weight(self, site: Site) -> Tensor:
        """The weight of a site as it is without anything merged into it, as stored.

        Args:
            site: one of `sites`.

        Raises:
            RuntimeError: the adapter is on no model.
            ValueError: the weight is quantised.
        """
        return self._require_host().base_weight(site)

    def norms(self, site: Site | str) -> Tensor:
        """Frobenius norm of the scaled update of each head; no update is formed.

        Args:
            site: one of `sites`, or its module path.

        Returns:
            (heads,), or (experts, heads) for packed experts.

        Raises:
            KeyError: no such site.

        Example:
            >>> import lortalib
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
            ...                              num_attention_heads=4, intermediate_size=64))
            >>> adapter = lortalib.nn.apply(model, "cp", rank=2)
            >>> adapter.norms("encoder.layer.0.attention.self.query").tolist()
            [0.0, 0.0, 0.0, 0.0]
        """
        group, site = self._find(site)
        with torch.no_grad():
            return group.head_norms(self._whole(group), site) * abs(self.scaling)

    def _find(self, site: Site | str) -> tuple[Group, Site]:
        for group in self.groups:
            if isinstance(site, str):
                known = next((each for each in group.sites if each.path == site), None)
            else:
                known = site if site in group.members else None
            if known is not None:
                return group, known
        raise KeyError(
            f"adapter {self.name!r} has no site {site!r}; the first of its {len(self.sites)} is "
            f"{self.sites[0].path!r}"
        )

    # On and off

    @property
    def is_on_model(self) -> bool:
        """Whether a model carries it."""
        return bool(self._host)

    @property
    def model(self) -> nn.Module:
        """The model that carries it.

        Raises:
            RuntimeError: the adapter was removed from its model.
        """
        return self._require_host().model

    def belong_to(self, host: Host | None) -> None:
        """Say what carries the adapter; None for nothing. For those who put adapters on models."""
        self._host = [] if host is None else [host]

    def _require_host(self) -> Host:
        if not self._host:
            raise RuntimeError(
                f"adapter {self.name!r} was removed from its model; apply or load it again"
            )
        host: Host = self._host[0]
        return host

    def enable(self) -> None:
        """Take part in the forward again (a merged adapter already does).

        Raises:
            ValueError: a module trained with it is in use by another active adapter.
        """
        self._require_host().enable(self)

    def disable(self) -> None:
        """Leave the forward: the model computes what its base does, bit for bit.

        Raises:
            ValueError: a module trained with it was resized meanwhile.
        """
        self._require_host().disable(self)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model computes what it would without this adapter."""
        active, merged = self.active, self.merged
        self.disable()
        try:
            yield
        finally:
            if merged:
                self.merge()
            elif active:
                self.enable()

    def keep_pairs(self) -> AbstractContextManager[None]:
        """Within this context no forward compares the parameters' numbers with those of the forward before.

        On a CPU they are compared once in each forward; on a GPU, which that would wait for, each forward
        makes its low-rank pairs anew. For decoding, where every token is a forward, this context spares both.
        It notices every change but writes through ``p.data`` and those of some fused optimisers.

        Example:
            >>> import lortalib, torch
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
            ...                              num_attention_heads=4, intermediate_size=64)).eval()
            >>> adapter = lortalib.nn.apply(model, "cp", rank=2)
            >>> with adapter.keep_pairs(), torch.no_grad():
            ...     outputs = [model(torch.tensor([[k]])) for k in range(3)]
        """
        return self.scope.keep()

    # In the weights

    def merge(self) -> None:
        """Write the update into the base's weights; the forward is then the base's own.

        The weights keep the numbers that the networks have now. If these change later, `unmerge` and
        merge again; until then nothing takes them, neither another adapter's merge nor
        ``remove(merged=True)``.

        Raises:
            ValueError: a factor that is not finite, a weight that cannot take the update (quantised,
                shared with a module that has no such update, or its dtype overflows).
        """
        self._require_host().merge(self)

    def unmerge(self) -> None:
        """Take the update out of the weights; the base gets back every bit. May be called again."""
        self._require_host().unmerge(self)

    def remove(self, *, merged: bool = False) -> None:
        """Take the adapter off its model, which is then as it was before `apply`.

        Args:
            merged: leave the update (and the modules trained with it) in the weights for good.

        Raises:
            RuntimeError: it was removed already.
            ValueError: ``merged=True`` and the update cannot be merged.
        """
        self._require_host().remove(self, merged)

    # In words

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the adapter to a folder; see `lortalib.nn.load`.

        Args:
            folder: made where it is not there.

        Returns:
            The folder.

        Raises:
            OSError: the folder cannot be written. Files that were there are then as they were.
            ValueError: the factors are on the meta device.
        """
        from ._files import save  # deferred on purpose: files know adapters

        self._require_host().prepare_files(self)
        return save(self, folder)

    def export_lora(self, folder: str | PathLike[str]) -> Path:
        """Write a standard LoRA of PEFT that makes the very same model; see
        `lortalib.nn.export_lora`.

        Args:
            folder: made where it is not there.

        Raises:
            OSError: the folder cannot be written.
            ValueError: a weight that LoRA has no pair for.
        """
        from ._files import export_lora  # deferred on purpose: files know adapters

        if self.is_on_model:
            self._require_host().prepare_files(self)
        return export_lora(self, folder)

    def __repr__(self) -> str:
        networks = {group.name: self.network(group) for group in self.groups}
        return describe(self, networks)
