"""Computes the low-rank pairs of all modules that one network updates, in one contraction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..._torch import integers, without_autocast
from ...decomp import NetworkView, TensorNetwork
from .._anatomy import Site
from .._group import Group
from .autograd import Contraction, Counter, matrices
from .cuts import CutByMatrix, CutRecipe


class Pair(NamedTuple):
    """A low-rank pair in the order of use, ``y += (x @ first^T) @ second``; leading axes are slices.

    Attributes:
        first: (p, features that the module reads).
        second: (p, features of the module's whole output). One of the two contains the scaling.
    """

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class ModuleSites:
    """The sites of one group in one module, whose updates are added together.

    Attributes:
        group: the group.
        sites: the sites; a fused projection has several.
    """

    group: Group
    sites: tuple[Site, ...]

    @cached_property
    def layer(self) -> int:
        """The position on the mode ``layer``."""
        return self.group.layers.index(self.sites[0].layer)

    @cached_property
    def signature(self) -> tuple[Any, ...]:
        """A key that is equal for modules of different layers whose pairs come from the same contraction."""
        return tuple((s.role, s.heads, s.writer, s.rows, s.fused) for s in self.sites)

    @property
    def writer(self) -> bool:
        """True if the second map is A, because the module writes to the residual stream. On the stream A is
        always first."""
        return self.sites[0].writer and not self.group.on_stream

    def in_parameters(self, cuts: Mapping[int, CutByMatrix]) -> tuple[int, ...] | None:
        """Return the parameters that A depends on if all these sites share one A, else None."""
        found = {cuts[site.heads].in_parameters for site in self.sites}
        return found.pop() if len(found) == 1 else None

    def pair(self, cuts: Mapping[int, CutByMatrix], scaling: float) -> Pair:
        """Make the pair of these sites from the cuts of their group, with the leading axes of the cuts."""
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
        a = a * scaling  # A is the smaller side if all matrices share it
        return Pair(b, a) if self.writer else Pair(a, b)


class PairIndex(NamedTuple):
    """The position of a matrix in the result of `PairSource.contract`: the tensor, and the matrix in it."""

    tensor: int
    matrix: int


class PairSource:
    """Makes the pairs of all modules that one network updates, and keeps none of the pairs.

    Attributes:
        group: the sites that share the network.
        network: the network.
        scaling: the number that the tensor is multiplied by to give the update.
        backwards: the count of backwards that reached the network's parameters.
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
        self._batch_modes = batch_modes  # leading axes of every pair, after the axis of the layers
        chosen = ("layer", "matrix")
        self._split = [m for m in chosen if network.legs.open_legs([m]) != (m,)]
        self._legs = self._laid_out(network.tensors).legs if self._split else network.legs
        self._signatures: list[ModuleSites] = []
        self._places: list[tuple[PairIndex, PairIndex]] = []  # a function of the signatures alone
        self._users: list[int] = []
        self._recipes: dict[object, CutRecipe] = {}

    def add(self, sites: ModuleSites) -> int:
        """Add a module.

        Returns:
            The number of the module's signature, which `pair` takes.
        """
        for number, known in enumerate(self._signatures):
            if known.signature == sites.signature:
                return number
        self._signatures.append(sites)
        self._recipes.clear()
        return len(self._signatures) - 1

    def signature(self, number: int) -> ModuleSites:
        """Return the first module whose signature has this number.

        Args:
            number: what `add` returned.
        """
        return self._signatures[number]

    def prepare(self) -> None:
        """Plan all contractions now, so that a network that cannot be contracted fails here, and
        torch.compile does not compile a second time because of a later plan."""
        for heads in self._head_counts():
            for over_layers in (False, True):
                self._recipe(heads, over_layers, self.network.stored[0])

    def users(self, number: int) -> int:
        """Count the modules of a layer that have the same first map as this one, including itself."""
        return self._users[number] if self._users else 1

    def pair(
        self, number: int, layer: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> Pair:
        """Compute the pair of one module alone, in plain differentiable operations.

        Args:
            number: what `add` returned.
            layer: position on the mode ``layer``.
            dtype: dtype of the result.
            device: device of the result, on which the module computes; the device of the parameters by
                default. The pair moves there because it is smaller than the module's input.
        """
        self._check_numbers(device)
        tensors = self.spread(self.network.stored)
        cuts = self._cut(self._view(tensors).select(layer=layer).tensors, False)
        first, second = self._signatures[number].pair(cuts, self.scaling)
        device = first.device if device is None else device
        return Pair(first.to(device, dtype), second.to(device, dtype))

    def pairs(self, dtype: torch.dtype, device: torch.device) -> list[list[Pair]]:
        """Compute the pairs of all layers as one node of the autograd graph, which saves no tensor.

        Returns:
            For each layer the pair of every signature. Modules of a layer that share one A get the
            same tensor object.
        """
        self._check_numbers(device)
        how = Contraction(
            self.group.name,
            len(self.group.layers),
            self.spread,
            self.contract,
            self.of_layers,
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
        """Refuse parameters on the meta device, which an engine offloaded and does not bring back."""
        if device is not None and device.type != "meta":
            gone = [t for t in self.network.stored if t.is_meta]
            if gone:
                raise RuntimeError(
                    f"{len(gone)} parameters of the network {self.group.name!r} are on the meta device, "
                    f"while the model computes on {device}: they were offloaded, or never given values. "
                    "Offload the base first (dispatch_model, device_map), then apply or load the adapter"
                )

    def place(self, number: int) -> tuple[PairIndex, PairIndex]:
        """Return the positions of a module's two maps in the result of `contract`."""
        return self._places[number]

    def contract(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Compute the matrices of every signature for all layers at once.

        Args:
            tensors: the tensors of the terms, of all layers or of some.

        Returns:
            Tensors (layers, batch modes, matrices, p, features); an axis has size 1 if all layers or
            matrices are alike. `place` returns the position of each module's matrices.
        """
        made: list[Tensor] = []
        sides: dict[int, tuple[int, int]] = {}  # positions of A and B for each head count
        shared: dict[tuple[int, ...], int] = {}  # position of an A that several head counts share
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
            # On the stream a writer has the same A as the readers, but another input x.
            firsts = [(first, m.sites[0].writer) for (first, _), m in zip(places, self._signatures)]
            self._places, self._users = places, [firsts.count(first) for first in firsts]
        return made

    def _head_counts(self) -> dict[int, None]:
        return dict.fromkeys(s.heads for module in self._signatures for s in module.sites)

    def _cut(self, tensors: Sequence[Tensor], over_layers: bool) -> dict[int, CutByMatrix]:
        """Compute the cuts of each head count over all its matrices, for all layers or for one."""
        with without_autocast(tensors[0].device.type):
            return {
                heads: self._recipe(heads, over_layers, tensors[0]).cut(tensors)
                for heads in self._head_counts()
            }

    def spread(self, stored: Sequence[Tensor]) -> Sequence[Tensor]:
        """Compute the tensors of the terms from parameters like those of the network. The modes layer and
        matrix, which are chosen by position, are whole in them, even if the network splits them."""
        tensors = self.network.spread(stored)
        return self._laid_out(tensors).tensors if self._split else tensors

    def of_layers(self, tensors: Sequence[Tensor], layers: Sequence[int]) -> Sequence[Tensor]:
        """Return the tensors of the terms, restricted to some layers."""
        if len(layers) == len(self.group.layers):
            return tensors
        at = integers(layers, tensors[0].device)
        return self._view(tensors).index_select("layer", at).tensors

    def _view(self, tensors: Sequence[Tensor]) -> NetworkView:
        return NetworkView(self._legs, tensors, self.network.modes)

    def _laid_out(self, tensors: Sequence[Tensor]) -> TensorNetwork:
        """Make layer and matrix whole."""
        network: TensorNetwork = NetworkView(self.network.legs, tensors, self.network.modes)
        for mode in self._split:
            every = integers(range(network.shape[mode]), tensors[0].device)
            network = network.index_select(mode, every)
        return network

    def _recipe(self, heads: int, over_layers: bool, like: Tensor) -> CutRecipe:
        """Return the recipe for the cuts of a head count; it is worked out once."""
        key = heads, over_layers, like.dtype, like.device
        if key not in self._recipes:
            with torch.inference_mode(False), torch.no_grad():  # constants outlive this forward
                self._recipes[key] = self._make_recipe(heads, over_layers, like)
        return self._recipes[key]

    def _make_recipe(self, heads: int, over_layers: bool, like: Tensor) -> CutRecipe:
        group = self.group
        network: TensorNetwork = self.network
        if self._split:
            network = self._laid_out(network.tensors)
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
            network = network.mode_dot(means.to(network.stored[0]), "head")
            constants = [means.reshape(network.tensors[-1].shape)]
        plan = network.cut_plan(*batch_modes)
        alike = plan.in_side is None or not plan.in_side.batch_modes[-1]
        return CutRecipe(roles, takes, constants, plan, plan.partition.in_side if alike else None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recipes": {}}
