"""Defines the adapter: tensor networks, and the projections that they update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn

from .._kinds import FLAG, Kind, takes
from ..decomp import Cut, Network, TensorNetwork
from ._adapter_files import AdapterFiles
from ._anatomy import Site
from ._config import AdapterConfig
from ._forward import Handle, PairSource, attach
from ._group import Group
from ._host_interface import Host
from ._sharded import divide_again, whole, whole_network
from ._table import count_parameters, describe
from ._trained_modules import TrainedModules


class Adapter(AdapterFiles):
    """One fine-tuning of a model: tensor networks, and the projections that they update.

    `lortalib.nn.apply` and `lortalib.nn.load` make adapters; user code never does. An adapter is a
    submodule of its model (``model.lortalib.<name>``), so it moves, trains and is saved with the model; no
    module of the model is replaced. If a call that changes the adapter's state fails, model and adapter
    are unchanged.

    Attributes:
        name: name on the model.
        config: the settings that the adapter was made with.
        groups: the groups of sites, each of which shares one network.
        networks: the networks by name of the group; they own every trainable parameter once.
        active: whether the adapter takes part in the model's forward.
        merged: whether the update is merged into the weights instead of added by hooks.
        tasks: the names of the tasks of a `TaskAdapter`; empty for any other adapter.

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                              intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "cp", rank=2)
        >>> adapter.name, adapter.active, adapter.merged, adapter.count()
        ('default', True, False, 100)
    """

    tasks: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        config: AdapterConfig,
        groups: tuple[Group, ...],
        networks: Mapping[str, Network],
        trained_modules: TrainedModules,
        sources: list[PairSource] | None = None,
    ) -> None:
        if sources is None:
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
        """The sources of the low-rank pairs, one for each group."""
        return self._sources

    @property
    def scaling(self) -> float:
        """The number that the tensor is multiplied by to give the update."""
        return self.config.scaling

    @property
    def dropout(self) -> float:
        """The probability of dropping an input feature of the adapter in training."""
        return self.config.dropout

    @takes(trainable_only=FLAG)
    def count(self, trainable_only: bool = True) -> int:
        """Count the parameters of the networks, each once; modules trained as a whole are not counted.

        Args:
            trainable_only: whether parameters marked ``(frozen)`` are left out.
        """
        return count_parameters(self.all_networks().values(), trainable_only)

    def network(self, group: Group) -> Network:
        """Return the network of a group.

        Args:
            group: one of `groups`.

        Raises:
            KeyError: the adapter has no such group.
        """
        networks = self.all_networks()
        if not isinstance(group, Group) or group.name not in networks:
            raise KeyError(
                f"adapter {self.name!r} has no group {group!r}; take one of adapter.groups, which are "
                f"{', '.join(each.name for each in self.groups)}"
            )
        return networks[group.name]

    def all_networks(self) -> dict[str, Network]:
        """Return every network that owns parameters: one for each group, and of tasks one for each task."""
        networks = cast("dict[str, Network]", dict(self.networks.items()))
        # accelerate has seen these, and may have offloaded them
        if any("_hf_hook" in network.__dict__ for network in networks.values()):
            self.bring_back()
        return networks

    def networks_of(self, group: Group) -> list[Network]:
        """Return the networks of ``group`` that own parameters: one, or one for each task."""
        return [self.network(group)]

    def tensor(self, group: Group) -> TensorNetwork:
        """Return the network of the whole tensor of ``group``; a `TaskAdapter` has that of all tasks."""
        return self.network(group)

    def _whole(self, group: Group) -> TensorNetwork:
        """Return the network of a group; tensors that are divided over processes are gathered."""
        self._reshard()
        return whole_network(self.network(group))

    def _reshard(self) -> None:
        """Let FSDP2 divide gathered parameters again, because it may gather them in a rounded dtype."""
        if self.is_on_model and self.scope.running is None:
            divide_again(self.model)

    def snapshot(self) -> Adapter:
        """Copy the adapter with the present values of its networks. The copy is on no model and has no
        modules that train as a whole. If the adapter is divided over processes, each has to call this."""
        networks = {group.name: self._copy(self.network(group)) for group in self.groups}
        return Adapter(self.name, self.config, self.groups, networks, TrainedModules())

    def task(self, name: str) -> Adapter:
        """Copy the task ``name`` out; only a `TaskAdapter` has tasks.

        Raises:
            ValueError: the adapter has no tasks.
        """
        raise ValueError(f"adapter {self.name!r} has no tasks; leave out the task {name!r}")

    def _copy(self, network: Network) -> Network:
        """Copy a network, with its whole tensors."""
        self._reshard()
        return network.like([whole(t).detach().clone() for t in network.stored])

    def low_rank_pair(self, site: Site | str) -> Cut:
        """Return the low-rank pair of a site, before scaling: A (p, width), B (heads*head_dim, p).

        Args:
            site: one of `sites`, or its module path.

        Raises:
            KeyError: no such site.
        """
        group, site = self._find(site)
        return group.pair(self._whole(group), site)

    def delta(self, site: Site | str, weight: Tensor | None = None) -> Tensor:
        """Return the scaled update of one weight as a dense tensor, in the shape of the stored weight.

        Args:
            site: one of `sites`, or its module path.
            weight: the base's weight, as stored, for an adapter that acts on the stream; the weight of its
                model by default.

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

    def base_weight(self, site: Site | str) -> Tensor:
        """Return the base's weight of a site, without any merged update, in the shape in which it is stored.

        Args:
            site: one of `sites`, or its module path.

        Raises:
            KeyError: no such site.
            RuntimeError: the adapter is on no model.
            ValueError: the weight is quantised, or computed from other parameters.
        """
        _, site = self._find(site)
        return self.require_host().base_weight(site)

    def norms(self, site: Site | str) -> Tensor:
        """Return the Frobenius norm of each head's scaled update, without forming the update.

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
                known = site if isinstance(site, Site) and site in group.members else None
            if known is not None:
                return group, known
        raise KeyError(
            f"adapter {self.name!r} has no site {site!r}; the first of its {len(self.sites)} is "
            f"{self.sites[0].path!r}"
        )

    # On and off

    def attach(self, model: nn.Module, handles: list[Handle]) -> None:
        """Put hooks on a model that add the updates; the host of the adapter calls this.

        Args:
            model: the model, or an object that finds its modules by path.
            handles: a list that gets the handle of each hook. If this call fails, no hook stays on the model.
        """
        attach(model, self, handles)

    @property
    def is_on_model(self) -> bool:
        """True while the adapter is on a model."""
        return bool(self._host)

    @property
    def model(self) -> nn.Module:
        """The model that the adapter is on.

        Raises:
            RuntimeError: the adapter was removed from its model.
        """
        return self.require_host().model

    def belong_to(self, host: Host | None) -> None:
        """Set the ``host`` that carries the adapter, or None. Code that installs adapters calls this."""
        self._host = [] if host is None else [host]

    def enable(self) -> None:
        """Switch the adapter on in the forward (a merged adapter is on already).

        Raises:
            ValueError: another active adapter uses a module that trains with this one.
        """
        self.require_host().enable(self)

    def disable(self) -> None:
        """Switch the adapter off: without others, the model computes the same bits as its base.

        Raises:
            ValueError: a module that trains with the adapter was resized meanwhile.
        """
        self.require_host().disable(self)

    def disabled(self) -> AbstractContextManager[None]:
        """Switch the adapter off within a context. Behind it the adapter is on as before: a merged one with
        the update that the weights had, whatever its networks, or the chosen task, have become."""
        return self.require_host().disabled(self)

    # In the weights

    def merge(self) -> None:
        """Add the update to the base's weights; the forward then needs no hooks of the adapter.

        The weights keep the update that the networks give now. If the networks change later, `unmerge`
        and merge again; until then the old update stays, also after another adapter's merge or
        ``remove(merged=True)``.

        Raises:
            ValueError: a factor is not finite, or a weight cannot take the update: it is quantised,
                computed from other parameters (parametrize, prune) or shared with a module that has no such
                update, or its dtype overflows.
        """
        self.require_host().merge(self)

    def unmerge(self) -> None:
        """Take the update out of the weights and restore the base bit for bit. May be called again."""
        self.require_host().unmerge(self)

    @takes(merged=FLAG)
    def remove(self, *, merged: bool = False) -> None:
        """Remove the adapter from its model, which is then the same as before `apply`.

        Args:
            merged: leave the update (and the modules trained with it) in the weights for good.

        Raises:
            RuntimeError: the adapter was removed already.
            ValueError: ``merged=True`` and the update cannot be merged.
        """
        self.require_host().remove(self, merged)

    # In words

    def __repr__(self) -> str:
        networks = {group.name: self.tensor(group) for group in self.groups}
        return describe(self, networks)


#: The kind of an argument that is an adapter.
ADAPTER = Kind(
    "an adapter, which apply, load and read return", lambda value: isinstance(value, Adapter)
)
