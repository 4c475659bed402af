"""The low-rank pairs of all modules of a group: made in one contraction, kept while they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..decomp import Cut, TensorNetwork
from ..decomp._contract import CutPlan, is_tracing, without_autocast
from ..decomp._network import NetworkView, cut_along
from ._groups import Group
from ._lowrank import Reads
from ._made import Made, Pair
from ._site import Site


@dataclass(frozen=True)
class Bundle:
    """The sites of one group in one module, whose shares are taken together.

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
    def kind(self) -> tuple[Any, ...]:
        """What it has in common with the bundles of other layers that are made alike."""
        return tuple((s.role, s.heads, s.writer, s.rows, s.fused) for s in self.sites)

    @property
    def writer(self) -> bool:
        """Whether the residual stream is the output."""
        return self.sites[0].writer

    def reads(self, cuts: Mapping[int, Cuts]) -> tuple[int, ...] | None:
        """The parameters that all its sites read through, if they read through one A."""
        reads = {cuts[site.heads].reads for site in self.sites}
        return reads.pop() if len(reads) == 1 else None

    def pair(self, cuts: Mapping[int, Cuts], scaling: float) -> Pair:
        """The pair of this bundle out of the cuts of its group; its leading axes are theirs."""
        parts = [cuts[site.heads].of(site) for site in self.sites]
        a, bs = parts[0].A, [part.B.mT for part in parts]
        if len(bs) > 1 and self.reads(cuts) is None:
            # Each site reads through rows of its own, so its rows stand under the others'.
            ranks = [part.A.shape[-2] for part in parts]
            a = torch.cat([part.A for part in parts], -2)
            bs = [pad(b, (0, 0, sum(ranks[:k]), sum(ranks[k + 1 :]))) for k, b in enumerate(bs)]
        b = bs[0]
        if self.sites[0].rows is not None:
            columns = torch.cat([site.rows.index(b.device) for site in self.sites if site.rows])
            own = torch.cat(bs, -1)
            b = own.new_zeros(*own.shape[:-1], self.sites[0].fused or 0)
            b = b.index_copy(-1, columns, own)
        a = a * scaling  # the smaller side, where all matrices read alike
        return Pair(b, a) if self.writer else Pair(a, b)


class Cuts(NamedTuple):
    """Pairs of all sites of a group with one head count.

    Attributes:
        roles: role for each position of the axis ``matrix``.
        cut: A (..., matrix, p, width) and B (..., matrix, heads*head_dim, p).
        reads: the parameters that A is made of, if it is the same for every matrix, else nothing.
    """

    roles: tuple[str, ...]
    cut: Cut
    reads: tuple[int, ...] | None

    def of(self, site: Site) -> Cut:
        """The pair of one site."""
        matrix = self.roles.index(site.role)
        at = (0 if side.shape[-3] == 1 else matrix for side in self.cut)
        return Cut(*(side.select(-3, position) for side, position in zip(self.cut, at)))


class Place(NamedTuple):
    """Where a matrix is among the tensors made for a group: which tensor, which of its matrices."""

    tensor: int
    matrix: int


@dataclass(frozen=True)
class _Recipe:
    """How the pairs of the sites with one head count come out of the parameters.

    Attributes:
        roles: their roles.
        takes: which axis of which parameter is restricted to which positions.
        constants: tensors of the network that are no parameters, behind these.
        division: where it is divided.
        reads: as in `Cuts`.
    """

    roles: tuple[str, ...]
    takes: list[tuple[int, int, Tensor]]
    constants: list[Tensor]
    plan: CutPlan
    reads: tuple[int, ...] | None

    def cut(self, tensors: Sequence[Tensor]) -> Cuts:
        """The cuts of these parameters."""
        own = [*tensors, *self.constants]
        for parameter, axis, at in self.takes:
            own[parameter] = own[parameter].index_select(axis, at)
        return Cuts(self.roles, cut_along(self.plan, own), self.reads)


class Factors:
    """The pairs of all modules that take a share of one network.

    Those of all layers come out of one contraction, and are kept while the parameters hold the
    same numbers. Nothing of one forward is kept: the graph behind the pairs ends in the parameters
    and can be walked any number of times.
    """

    def __init__(
        self,
        group: Group,
        network: TensorNetwork,
        scaling: float,
        reads: Reads,
        rows: tuple[str, ...] = (),
    ) -> None:
        self._rows = rows  # modes behind that of the layers
        self.group = group
        self.reads = reads
        self.network = network
        self.scaling = scaling
        self.kinds: list[Bundle] = []
        self.places: list[tuple[Place, Place]] = []  # see `make`; the same every time
        self.matrices: list[int] = []  # of each tensor made
        self._made: dict[tuple[torch.dtype, torch.device], Made] = {}
        self._recipes: dict[object, _Recipe] = {}

    def add(self, bundle: Bundle) -> int:
        """Let a module take part.

        Returns:
            The number by which it asks for its pair.
        """
        for number, known in enumerate(self.kinds):
            if known.kind == bundle.kind:
                return number
        self.kinds.append(bundle)
        self._made.clear()
        self._recipes.clear()
        return len(self.kinds) - 1

    def pair(
        self, kind: int, layer: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> Pair:
        """The pair of one module.

        Args:
            kind: what `add` returned.
            layer: position on the mode ``layer``.
            dtype: of the result.
            device: of the result, where the module computes; by default that of the parameters. A
                pair is smaller than what is read through it, so it is what travels.

        Returns:
            The pair. Modules of a layer that read through the same rows get the very same first.
        """
        device = self.network.tensors[0].device if device is None else device
        if is_tracing():
            return self._alone(kind, layer, dtype, device)
        made = self._made.get((dtype, device))
        now = self._now()
        if made is not None and made.checked == now and now is not None:
            return made.pairs[layer][kind]
        if made is None or not made.hold(self.network):
            if any(p.is_meta or p.is_inference() for p in self.network.tensors):
                return self._alone(kind, layer, dtype, device)  # no values or versions to compare
            made = self._made[dtype, device] = Made(self, dtype, device)
        made.checked = now
        return made.pairs[layer][kind]

    def _now(self) -> tuple[int, int, bool] | None:
        """The same until the next forward, backward or mode: parameters are checked once for each."""
        reads = self.reads
        if reads.around is None:
            return None
        return reads.forwards, reads.backwards, torch.is_grad_enabled()

    def readers(self, kind: int) -> int:
        """How many modules of a layer have the same first as this one, itself among them."""
        firsts = [first for first, _ in self.places]
        return firsts.count(firsts[kind]) if firsts else 1

    def doubt(self) -> None:
        """The parameters may have been written to unseen: by ``p.data``, or by foreign kernels."""
        for made in self._made.values():
            made.doubted = True

    def make(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Place, Place]]]:
        """The pairs of every kind, of all layers at once.

        Args:
            tensors: the parameters, over all layers or some.

        Returns:
            Tensors (layers, matrices, p, features), with size 1 where all layers or all matrices are
            alike; and for every kind where its first and its second are.
        """
        made: list[Tensor] = []
        sides: dict[int, tuple[int, int]] = {}  # for each head count where its A and its B are
        shared: dict[tuple[int, ...], int] = {}  # head counts that read alike have one A
        cuts = self._cut(tensors)
        for heads, (_, cut, reads) in cuts.items():
            known = None if reads is None else shared.get(reads)
            if known is None:
                known = len(made)
                made.append(cut.A * self.scaling)
            if reads is not None:
                shared[reads] = known
            sides[heads] = known, len(made)
            made.append(cut.B.mT)
        places = []
        for kind in self.kinds:
            site = kind.sites[0]
            if len(kind.sites) > 1 or site.rows is not None:
                places.append((Place(len(made), 0), Place(len(made) + 1, 0)))
                made += [side.unsqueeze(-3) for side in kind.pair(cuts, self.scaling)]
                continue
            matrix = cuts[site.heads].roles.index(site.role)
            a, b = (Place(k, matrix % made[k].shape[-3]) for k in sides[site.heads])
            places.append((b, a) if site.writer else (a, b))
        return made, places

    def _cut(self, tensors: Sequence[Tensor], layer: int | None = None) -> dict[int, Cuts]:
        """The cuts over the matrices of each head count.

        Args:
            tensors: the parameters; for all layers, or some.
            layer: a layer, to select first; without, the cuts are over the layers too.
        """
        cuts = {}
        with without_autocast(tensors[0].device.type):
            for heads in dict.fromkeys(s.heads for kind in self.kinds for s in kind.sites):
                recipe = self._recipe(heads, layer is None, tensors[0])
                cuts[heads] = recipe.cut(tensors if layer is None else self._at(layer))
        return cuts

    def rows(self, tensors: Sequence[Tensor], layers: Sequence[int]) -> Sequence[Tensor]:
        """The parameters over some layers."""
        if len(layers) == len(self.group.layers):
            return tensors
        at = torch.tensor(layers, device=tensors[0].device)
        network = NetworkView(self.network.legs, tensors, self.network.modes)
        return network.index_select("layer", at).tensors

    def _at(self, layer: int) -> Sequence[Tensor]:
        return self.network.select(layer=layer).tensors

    def prepare(self) -> None:
        """Work out now what plain operations need: a compiler that saw it done would compile twice."""
        for heads in dict.fromkeys(s.heads for kind in self.kinds for s in kind.sites):
            self._recipe(heads, False, self.network.tensors[0])

    def _recipe(self, heads: int, over_layers: bool, like: Tensor) -> _Recipe:
        """How the pairs of a head count are cut; worked out once."""
        key = heads, over_layers, like.dtype, like.device
        if key not in self._recipes:
            with torch.inference_mode(False), torch.no_grad():  # constants outlive this forward
                self._recipes[key] = self._work_out(heads, over_layers, like)
        return self._recipes[key]

    def _work_out(self, heads: int, over_layers: bool, like: Tensor) -> _Recipe:
        group = self.group
        network: TensorNetwork = self.network
        here = {s.role for kind in self.kinds for s in kind.sites if s.heads == heads}
        roles = tuple(role for role in group.roles if role in here)
        takes: list[tuple[int, int, Tensor]] = []
        constants: list[Tensor] = []
        over: tuple[str, ...] = ("layer", *self._rows, "matrix")
        if not over_layers:
            network, over = network.select(layer=0), (*self._rows, "matrix")
        if len(roles) < len(group.roles):
            at = torch.tensor([group.roles.index(role) for role in roles], device=like.device)
            legs = [term.legs for term in network.legs.terms]
            takes = [(k, t.index("matrix"), at) for k, t in enumerate(legs) if "matrix" in t]
            network = network.index_select("matrix", at)
        if heads != group.heads:
            constants = [_means(heads, group.heads, like)]
            network = network.mode_dot(constants[0], "head")
        plan = network.cut_plan(*over)
        alike = plan.in_side is None or not plan.in_side.batch_modes[-1]
        reads = plan.partition.in_side if alike else None
        return _Recipe(roles, takes, constants, plan, reads)

    def _alone(self, kind: int, layer: int, dtype: torch.dtype, device: torch.device) -> Pair:
        """The pair of one module by itself, in plain differentiable operations."""
        cuts = self._cut(self.network.tensors, layer)
        first, second = self.kinds[kind].pair(cuts, self.scaling)
        return Pair(first.to(device, dtype), second.to(device, dtype))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}, "_recipes": {}}


def _means(heads: int, query_heads: int, like: Tensor) -> Tensor:
    """(heads, query_heads): each key/value head takes the mean of its group of query heads."""
    size = query_heads // heads
    eye = torch.eye(heads, dtype=like.dtype, device=like.device)
    return eye.repeat_interleave(size, 1) / size
