"""The low-rank pairs of all modules that one network updates, out of one contraction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..._torch import integers, without_autocast
from ...decomp import Cut, CutPlan, NetworkView, TensorNetwork
from .._anatomy import Site
from .._group import Group
from .autograd import Contraction, Counter, matrices


class Pair(NamedTuple):
    """The two maps of an update, ``y += (x @ first^T) @ second``; leading axes are slices.

    Attributes:
        first: (p, features that the module reads).
        second: (p, features of the module's whole output). The scaling is in one of them.
    """

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class ModuleSites:
    """The sites of one group in one module, whose updates are added together.

    Attributes:
        group: the group.
        sites: the sites, several where the projection is fused.
    """

    group: Group
    sites: tuple[Site, ...]

    @cached_property
    def layer(self) -> int:
        """Position on the mode ``layer``."""
        return self.group.layers.index(self.sites[0].layer)

    @cached_property
    def signature(self) -> tuple[Any, ...]:
        """Equal for modules of different layers whose pairs are made alike."""
        return tuple((s.role, s.heads, s.writer, s.rows, s.fused) for s in self.sites)

    @property
    def writer(self) -> bool:
        """Whether the pair's A is the second map, because the residual stream is the output of T's site; a
        tensor on the stream reads and writes the same space."""
        return self.sites[0].writer and not self.group.on_stream

    def in_parameters(self, cuts: Mapping[int, CutByMatrix]) -> tuple[int, ...] | None:
        """The parameters that A is made of, if all these sites have one A."""
        found = {cuts[site.heads].in_parameters for site in self.sites}
        return found.pop() if len(found) == 1 else None

    def pair(self, cuts: Mapping[int, CutByMatrix], scaling: float) -> Pair:
        """The pair of these sites out of the cuts of their group; its leading axes are theirs."""
        parts = [cuts[site.heads].of(site) for site in self.sites]
        a, bs = parts[0].A, [part.B.mT for part in parts]
        if len(bs) > 1 and self.in_parameters(cuts) is None:
            # Each site has an A of its own, so its rows of B stand below those of the sites before.
            ranks = [part.A.shape[-2] for part in parts]
            a = torch.cat([part.A for part in parts], -2)
            bs = [pad(b, (0, 0, sum(ranks[:k]), sum(ranks[k + 1 :]))) for k, b in enumerate(bs)]
        b = bs[0]
        if self.sites[0].rows is not None:
            columns = torch.cat([site.rows.index(b.device) for site in self.sites if site.rows])
            own = torch.cat(bs, -1)
            b = own.new_zeros(*own.shape[:-1], self.sites[0].fused or 0)
            b = b.index_copy(-1, columns, own)
        a = a * scaling  # the smaller side, where all matrices have one A
        return Pair(b, a) if self.writer else Pair(a, b)


class CutByMatrix(NamedTuple):
    """Cuts of all sites of a group with one head count.

    Attributes:
        roles: role for each position of the axis ``matrix``.
        cut: A (..., matrix, p, width) and B (..., matrix, heads*head_dim, p).
        in_parameters: the parameters that A is made of, if it is the same for every matrix.
    """

    roles: tuple[str, ...]
    cut: Cut
    in_parameters: tuple[int, ...] | None

    def of(self, site: Site) -> Cut:
        """The cut of one site."""
        matrix = self.roles.index(site.role)
        at = (0 if side.shape[-3] == 1 else matrix for side in self.cut)
        return Cut(*(side.select(-3, position) for side, position in zip(self.cut, at)))


class PairIndex(NamedTuple):
    """Where a matrix is among the tensors that were contracted: which tensor, which of its matrices."""

    tensor: int
    matrix: int


@dataclass(frozen=True)
class CutRecipe:
    """How the cuts of the sites with one head count come out of the parameters.

    Attributes:
        roles: their roles.
        takes: which axis of which parameter is restricted to which positions.
        constants: tensors of the network that are no parameters, behind these.
        plan: where the network is divided.
        in_parameters: as in `CutByMatrix`.
    """

    roles: tuple[str, ...]
    takes: list[tuple[int, int, Tensor]]
    constants: list[Tensor]
    plan: CutPlan
    in_parameters: tuple[int, ...] | None

    def cut(self, tensors: Sequence[Tensor]) -> CutByMatrix:
        """The cuts of these parameters."""
        own = [*tensors, *self.constants]
        for parameter, axis, at in self.takes:
            own[parameter] = own[parameter].index_select(axis, at)
        return CutByMatrix(self.roles, self.plan.cut(own), self.in_parameters)


class PairSource:
    """Makes the pairs of all modules that one network updates. It keeps none of them.

    Attributes:
        group: the sites that share the network.
        network: the network.
        scaling: the factor of the tensor in the update.
        backwards: how many backwards have passed the network's parameters.
    """

    def __init__(
        self,
        group: Group,
        network: TensorNetwork,
        scaling: float,
        batch_modes: tuple[str, ...] = (),
    ) -> None:
        self.group = group
        self.network = network
        self.scaling = scaling
        self.backwards = Counter()
        self._batch_modes = batch_modes  # leading axes of every pair, behind that of the layers
        self._signatures: list[ModuleSites] = []
        self._places: list[tuple[PairIndex, PairIndex]] = []  # a function of the signatures alone
        self._users: list[int] = []
        self._recipes: dict[object, CutRecipe] = {}

    def add(self, sites: ModuleSites) -> int:
        """Let a module take part.

        Returns:
            The number of its signature, by which it asks for its pair.
        """
        for number, known in enumerate(self._signatures):
            if known.signature == sites.signature:
                return number
        self._signatures.append(sites)
        self._recipes.clear()
        return len(self._signatures) - 1

    def signature(self, number: int) -> ModuleSites:
        """The first module that has this number.

        Args:
            number: what `add` returned.
        """
        return self._signatures[number]

    def prepare(self) -> None:
        """Plan all contractions now: what cannot be contracted fails here, and a compiler that saw it
        done later would compile twice."""
        for heads in self._head_counts():
            for over_layers in (False, True):
                self._recipe(heads, over_layers, self.network.stored[0])

    def users(self, number: int) -> int:
        """How many modules of a layer have the same first map as this one, itself among them."""
        return self._users[number] if self._users else 1

    def pair(
        self, number: int, layer: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> Pair:
        """The pair of one module by itself, in plain differentiable operations.

        Args:
            number: what `add` returned.
            layer: position on the mode ``layer``.
            dtype: of the result.
            device: of the result, where the module computes; that of the parameters by default. A
                pair is smaller than what is read through it, so it is what travels.
        """
        self._check_numbers(device)
        cuts = self._cut(self.network.select(layer=layer).tensors, False)
        first, second = self._signatures[number].pair(cuts, self.scaling)
        device = first.device if device is None else device
        return Pair(first.to(device, dtype), second.to(device, dtype))

    def pairs(self, dtype: torch.dtype, device: torch.device) -> list[list[Pair]]:
        """The pairs of all layers, as one node of the graph, which saves no tensor.

        Returns:
            For each layer the pair of every signature. Modules of a layer that have one A get the very
            same tensor.
        """
        self._check_numbers(device)
        how = Contraction(
            self.group.name,
            len(self.group.layers),
            self.network.spread,
            self.contract,
            self._of_layers,
            self.backwards,
        )
        counts, flat = matrices(how, dtype, device, self.network.stored)
        rows = iter(flat)
        layers = range(how.layers)
        made = [[[next(rows) for _ in range(n)] for _ in layers] for n in counts]
        return [
            [Pair(made[a][layer][i], made[b][layer][j]) for (a, i), (b, j) in self._places]
            for layer in layers
        ]

    def _check_numbers(self, device: torch.device | None) -> None:
        """Refuse placeholders: an engine moved the parameters away and does not bring them back."""
        if device is not None and device.type != "meta":
            gone = [t for t in self.network.stored if t.is_meta]
            if gone:
                raise RuntimeError(
                    f"{len(gone)} parameters of the network {self.group.name!r} are on the meta device, "
                    f"while the model computes on {device}: they were offloaded, or never given values. "
                    "Offload the base first (dispatch_model, device_map), then apply or load the adapter"
                )

    def place(self, number: int) -> tuple[PairIndex, PairIndex]:
        """Where the two maps of a module are in what `contract` returns."""
        return self._places[number]

    def contract(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The matrices of every signature, of all layers at once.

        Args:
            tensors: of the terms, over all layers or some.

        Returns:
            Tensors (layers, batch modes, matrices, p, features), with size 1 where all layers or all
            matrices are alike; `place` tells which is whose.
        """
        made: list[Tensor] = []
        sides: dict[int, tuple[int, int]] = {}  # for each head count where its A and its B are
        shared: dict[tuple[int, ...], int] = {}  # head counts with the same A have it once
        cuts = self._cut(tensors, True)
        for heads, (_, cut, parameters) in cuts.items():
            known = None if parameters is None else shared.get(parameters)
            if known is None:
                known = len(made)
                made.append(cut.A * self.scaling)
            if parameters is not None:
                shared[parameters] = known
            sides[heads] = known, len(made)
            made.append(cut.B.mT)
        places = []
        for module in self._signatures:
            site = module.sites[0]
            if len(module.sites) > 1 or site.rows is not None:
                places.append((PairIndex(len(made), 0), PairIndex(len(made) + 1, 0)))
                made += [side.unsqueeze(-3) for side in module.pair(cuts, self.scaling)]
                continue
            matrix = cuts[site.heads].roles.index(site.role)
            a, b = (PairIndex(k, matrix % made[k].shape[-3]) for k in sides[site.heads])
            places.append((b, a) if module.writer else (a, b))
        if places != self._places:
            # On the stream a writer has the A of the readers, and another x.
            firsts = [(first, m.sites[0].writer) for (first, _), m in zip(places, self._signatures)]
            self._places, self._users = places, [firsts.count(first) for first in firsts]
        return made

    def _head_counts(self) -> dict[int, None]:
        return dict.fromkeys(s.heads for module in self._signatures for s in module.sites)

    def _cut(self, tensors: Sequence[Tensor], over_layers: bool) -> dict[int, CutByMatrix]:
        """The cuts over the matrices of each head count, over the layers too or for one of them."""
        with without_autocast(tensors[0].device.type):
            return {
                heads: self._recipe(heads, over_layers, tensors[0]).cut(tensors)
                for heads in self._head_counts()
            }

    def _of_layers(self, tensors: Sequence[Tensor], layers: Sequence[int]) -> Sequence[Tensor]:
        """The tensors of the terms, restricted to some layers."""
        if len(layers) == len(self.group.layers):
            return tensors
        at = integers(layers, tensors[0].device)
        network = NetworkView(self.network.legs, tensors, self.network.modes)
        return network.index_select("layer", at).tensors

    def _recipe(self, heads: int, over_layers: bool, like: Tensor) -> CutRecipe:
        """How the cuts of a head count are made; worked out once."""
        key = heads, over_layers, like.dtype, like.device
        if key not in self._recipes:
            with torch.inference_mode(False), torch.no_grad():  # constants outlive this forward
                self._recipes[key] = self._make_recipe(heads, over_layers, like)
        return self._recipes[key]

    def _make_recipe(self, heads: int, over_layers: bool, like: Tensor) -> CutRecipe:
        group = self.group
        network: TensorNetwork = self.network
        here = {s.role for module in self._signatures for s in module.sites if s.heads == heads}
        roles = tuple(role for role in group.roles if role in here)
        takes: list[tuple[int, int, Tensor]] = []
        constants: list[Tensor] = []
        batch_modes: tuple[str, ...] = ("layer", *self._batch_modes, "matrix")
        if not over_layers:
            network, batch_modes = network.select(layer=0), batch_modes[1:]
        if len(roles) < len(group.roles):
            at = torch.tensor([group.roles.index(role) for role in roles], device=like.device)
            legs = [term.legs for term in network.legs.terms]
            takes = [(k, t.index("matrix"), at) for k, t in enumerate(legs) if "matrix" in t]
            network = network.index_select("matrix", at.to(network.stored[0].device))
        if heads != group.heads:
            means = group.head_means(heads, like)
            constants = [means]
            network = network.mode_dot(means.to(network.stored[0]), "head")
        plan = network.cut_plan(*batch_modes)
        alike = plan.in_side is None or not plan.in_side.batch_modes[-1]
        return CutRecipe(roles, takes, constants, plan, plan.partition.in_side if alike else None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recipes": {}}
