"""Computes the low-rank pairs of all modules that one network updates, in one contraction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch import integers, not_traced, without_autocast
from ...decomp import CutPlan, NetworkView, TensorNetwork, ThreeWayPlan, three_way_plan
from .._anatomy import Site
from .._group import Group
from .autograd import Contraction, Counter, matrices
from .cuts import CutByMatrix, CutRecipe
from .module_sites import ModuleSites, Pair


class PairIndex(NamedTuple):
    """The position of a matrix in the result of `PairSource.contract`: the tensor, and the matrix in it."""

    tensor: int
    matrix: int


class PairSource:
    """Makes the pairs of all modules that one network updates, and keeps none of the pairs.

    Args:
        group: the sites that share the network.
        network: the network.
        scaling: the number that the tensor is multiplied by to give the update.
        row_mode: a mode whose positions are the rows of a batch, if rows have parameters of their own.

    Attributes:
        group, network, scaling: the arguments.
        backwards: the count of backwards that reached the network's parameters.
        has_middle: whether the sides of all pairs are the same for all rows, which then differ in a small
            middle only.
    """

    def __init__(
        self, group: Group, network: TensorNetwork, scaling: float, row_mode: str = ""
    ) -> None:
        self.group = group
        self.network = network
        self.scaling = scaling
        self.backwards = Counter()
        self._row_mode = row_mode
        self._split = [m for m in ("layer", "matrix") if network.legs.open_legs([m]) != (m,)]
        whole = self._laid_out(network.tensors) if self._split else network
        self._legs = whole.legs
        self._signatures: list[ModuleSites] = []
        self._places: list[tuple[PairIndex, ...]] = []  # a function of the signatures alone
        self._users: list[int] = []
        self._recipes: dict[object, CutRecipe] = {}
        counts = {site.heads for site in group.sites} if row_mode else set()
        like = network.stored[0]
        pooled = [self._pooled(heads, like, whole)[0] for heads in counts]
        self.has_middle = bool(row_mode) and all(self._three_way(each) for each in pooled)

    def parts(self, sites: Sequence[Site]) -> list[tuple[Site, ...]]:
        """Divide the sites of a module into parts with a pair each: sites with middles have none together."""
        return [(site,) for site in sites] if self.has_middle else [tuple(sites)]

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

    def plan_again(self) -> None:
        """Plan all contractions anew, after the ranks of the network were changed."""
        self._recipes.clear()
        self.prepare()

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
        cuts = self._cut(self._of_layer(tensors, layer), False)
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
        made = self.matrices(self.network.stored, dtype, device)
        return [
            [Pair(*(made[k][layer][matrix] for k, matrix in place)) for place in self._places]
            for layer in range(len(self.group.layers))
        ]

    def matrices(
        self,
        stored: Sequence[Tensor],
        dtype: torch.dtype,
        device: torch.device,
        wide: torch.dtype | None = None,
    ) -> list[list[list[Tensor]]]:
        """Compute the matrices of all layers from parameters, as one node of the autograd graph.

        Args:
            stored: the parameters, one for each term.
            dtype: dtype of the result.
            device: device of the result.
            wide: dtype of the contraction, which then takes place on ``device``; by default it is that of
                the parameters, on their device.

        Returns:
            The matrices, by tensor of `contract`, layer and matrix.
        """

        def spread(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            if wide is not None:
                tensors = [tensor.to(device, wide) for tensor in tensors]
            return self.spread(tensors)

        layers = len(self.group.layers)
        how = Contraction(
            self.group.name, layers, spread, self.contract, self.of_layers, self.backwards
        )
        counts, flat = matrices(how, dtype, device, stored)
        rows = iter(flat)
        return [[[next(rows) for _ in range(n)] for _ in range(layers)] for n in counts]

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

    def place(self, number: int) -> tuple[PairIndex, ...]:
        """Return the positions of a module's two maps in the result of `contract`, and of its middle."""
        return self._places[number]

    def contract(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Compute the matrices of every signature for all layers at once.

        Args:
            tensors: the tensors of the terms, of all layers or of some.

        Returns:
            Tensors (layers, matrices, p, features), with an axis of rows after the matrices if there is a
            ``row_mode``; an axis has size 1 if all layers, matrices or rows are alike. A middle has (heads,
            c, p, q) in place of (p, features). `place` returns the position of each module's matrices.
        """
        axis = 2 if self._row_mode else 1  # of the matrices in a cut
        made: list[Tensor] = []
        sides: dict[int, tuple[int, ...]] = {}  # positions of A, B and middle for each head count
        shared: dict[tuple[int, ...], int] = {}  # position of an A that several head counts share
        cuts = self._cut(tensors, True)
        for heads, (_, cut, parameters, middle) in cuts.items():
            known = None if parameters is None else shared.get(parameters)
            if known is None:
                known = len(made)
                made.append(cut.A * self.scaling)
            if parameters is not None:
                shared[parameters] = known
            own = [cut.B.mT] if middle is None else [cut.B.mT, middle]
            sides[heads] = known, *range(len(made), len(made) + len(own))
            made += own
        places: list[tuple[PairIndex, ...]] = []
        for module in self._signatures:
            site = module.sites[0]
            if not self.has_middle and (len(module.sites) > 1 or site.rows is not None):
                places.append((PairIndex(len(made), 0), PairIndex(len(made) + 1, 0)))
                made += [side.unsqueeze(-3) for side in module.pair(cuts, self.scaling)]
                continue
            matrix = cuts[site.heads].roles.index(site.role)
            a, b, *rest = (PairIndex(k, matrix % made[k].shape[axis]) for k in sides[site.heads])
            places.append((b, a, *rest) if module.writer else (a, b, *rest))
        if places != self._places:
            # On the stream a writer has the same A as the readers, but another input x.
            firsts = [(place[0], m.sites[0].writer) for place, m in zip(places, self._signatures)]
            self._places, self._users = places, [firsts.count(first) for first in firsts]
        return [tensor.movedim(axis, 1) for tensor in made]

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

    def _of_layer(self, tensors: Sequence[Tensor], layer: int) -> list[Tensor]:
        """Take one layer of the tensors of the terms; torch.jit.trace, whose sizes are tensors, follows."""
        legs = [term.legs for term in self._legs.unhashed.terms]
        return [
            tensor.select(own.index("layer"), layer) if "layer" in own else tensor
            for own, tensor in zip(legs, tensors)
        ]

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
            # Constants outlive this forward.
            with not_traced(), torch.inference_mode(False), torch.no_grad():
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
        if not over_layers:
            network = network.select(layer=0)
        if len(roles) < len(group.roles):
            at = torch.tensor([group.roles.index(role) for role in roles], device=like.device)
            legs = [term.legs for term in network.legs.terms]
            takes = [(k, t.index("matrix"), at) for k, t in enumerate(legs) if "matrix" in t]
            network = network.index_select("matrix", at.to(network.stored[0].device))
        network, constants = self._pooled(heads, like, network)
        plan: CutPlan | ThreeWayPlan | None = self._three_way(network) if self.has_middle else None
        if plan is None:
            plan = network.cut_plan(*self._leading(network))
        alike = plan.in_side is None or not plan.in_side.batch_modes[-1]
        parameters = () if plan.in_side is None else plan.in_side.parameters
        return CutRecipe(roles, takes, constants, plan, parameters if alike else None)

    def _pooled(
        self, heads: int, like: Tensor, network: TensorNetwork
    ) -> tuple[TensorNetwork, list[Tensor]]:
        """Return a network over the heads of its sites, and the constants that it has more than before."""
        if heads == self.group.heads:
            return network, []
        means = self.group.head_means(heads, like)
        network = network.mode_dot(means.to(network.stored[0]), "head")
        return network, [means.reshape(network.tensors[-1].shape)]

    def _leading(self, network: TensorNetwork) -> list[str]:
        """List the modes that are leading axes of a cut."""
        return [mode for mode in ("layer", self._row_mode, "matrix") if mode in network.modes]

    def _three_way(self, network: TensorNetwork) -> ThreeWayPlan | None:
        return three_way_plan(network, self._row_mode, *self._leading(network))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recipes": {}}
