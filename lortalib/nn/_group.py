"""Groups the sites that share one tensor: the sites of a stack with equal head count and widths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .._torch import without_autocast
from ..decomp import Cut, Shape, TensorNetwork
from ._anatomy import ROLES, Site, as_stored, through_weight


@dataclass(frozen=True)
class Group:
    """Sites that share one tensor T[layer, head, matrix, in, out], or S[layer, matrix, in, out].

    Attributes:
        name: name of the group's network in the adapter, unique there.
        heads: size of the mode ``head``; a multiple of the heads of each site.
        sites: ordered by layer and role.
        layers: layer index of the model for each position of the mode ``layer``.
        roles: role for each position of the mode ``matrix``.
        on_stream: whether the tensor acts on the residual stream (S) and not on the weights (T).

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                              intermediate_size=64))
        >>> group = lortalib.nn.plan(model, "cp", rank=2).groups[0]
        >>> group.name, group.heads, group.layers, group.roles
        ('encoder', 4, (0, 1), ('q', 'k', 'v', 'o'))
    """

    name: str
    heads: int
    sites: tuple[Site, ...]
    layers: tuple[int, ...]
    roles: tuple[str, ...]
    on_stream: bool = False

    @cached_property
    def members(self) -> frozenset[Site]:
        """The sites as a set, for fast look-up."""
        return frozenset(self.sites)

    @property
    def meaning(self) -> tuple[object, ...]:
        """What the tensor means: groups of equal meaning turn equal tensors into equal updates."""
        keys = [site.key for site in self.sites]
        return self.heads, self.layers, self.roles, self.on_stream, keys

    @property
    def shape(self) -> Shape:
        """The shape of the group's tensor."""
        site = self.sites[0]
        expert = {"expert": site.experts} if site.experts else {}
        head = {} if self.on_stream else {"head": self.heads}
        return Shape(
            {
                "layer": len(self.layers),
                **expert,
                **head,
                "matrix": len(self.roles),
                "in": site.width,
                "out": site.width if self.on_stream else site.head_dim,
            }
        )

    def head_means(self, heads: int, like: Tensor) -> Tensor:
        """Make the matrix (heads, query heads) that averages the query heads of each key/value head.

        Args:
            heads: number of heads of a site with grouped queries.
            like: a tensor with the dtype and device of the result.
        """
        size = self.heads // heads
        eye = torch.eye(heads, dtype=like.dtype, device=like.device)
        return eye.repeat_interleave(size, 1) / size

    def slice(self, network: TensorNetwork, site: Site) -> TensorNetwork:
        """Return the slice of ``network`` that is the update of ``site``, over the site's heads."""
        at = {"layer": self.layers.index(site.layer), "matrix": self.roles.index(site.role)}
        view = network.select(**at)
        if site.heads == self.heads:
            return view
        return view.mode_dot(self.head_means(site.heads, network.stored[0]), "head")

    def pair(self, network: TensorNetwork, site: Site) -> Cut:
        """Return the low-rank pair of ``site`` in ``network``, before scaling: A (p, width), and
        B (heads*head_dim, p), or (width, p) on the stream."""
        return self.slice(network, site).cut()

    def dense(self, network: TensorNetwork, site: Site) -> Tensor:
        """Return the dense slice of ``site`` in ``network``, before scaling: (heads*head_dim, width), or
        (width, width) on the stream, with a leading axis for packed experts. Its dtype is the factors', also
        under autocast."""
        with without_autocast(network.stored[0].device.type):
            if not site.experts:
                a, b = self.pair(network, site)
                return b @ a
            view = self.slice(network, site)
            modes = ("expert", "head", "out", "in")
            order = [view.modes.index(mode) for mode in modes if mode in view.modes]
            return view.dense().permute(order).reshape(site.experts, -1, site.width)

    def delta(self, network: TensorNetwork, site: Site, weight: Tensor | None) -> Tensor:
        """Return the update of one weight, before scaling, in the shape of the stored weight.

        Args:
            network: the network of the group.
            site: a site of the group.
            weight: the base's weight, as stored; only a tensor on the stream needs it.

        Raises:
            ValueError: a tensor on the stream and no weight.
        """
        dense = self.dense(network, site)
        if not self.on_stream:
            return as_stored(dense, site)
        if weight is None:
            raise ValueError(
                f"the change of {site.path} is a product with its weight, which was not given: the "
                "adapter acts on the stream and is on no model. Load it onto one"
            )
        with without_autocast(dense.device.type):
            return through_weight(weight.to(dense.device, dense.dtype), dense, site)

    def head_norms(self, network: TensorNetwork, site: Site) -> Tensor:
        """Return the Frobenius norm of each head's slice, before scaling, from the pair alone.

        Args:
            network: the network of the group.
            site: a site of the group.

        Returns:
            (heads,), or (experts, heads) for packed experts; a tensor on the stream has one head. In float32
            at least, because squares overflow in float16.
        """
        view = self.slice(network, site)
        cut = view.cut("expert") if site.experts else view.cut()
        a, b = (side.to(torch.promote_types(side.dtype, torch.float32)) for side in cut)
        gram = a @ a.mT
        heads = b.unflatten(-2, (site.heads, -1))
        squares = torch.einsum("...hop,...pq,...hoq->...h", heads, gram, heads)
        norms = squares.clamp(min=0).sqrt()
        return norms.expand(site.experts, -1) if site.experts else norms


def group_sites(sites: Iterable[Site], gqa: str, on_stream: bool = False) -> list[Group]:
    """Divide sites into groups of equal stack, heads, width and head_dim.

    Args:
        sites: the sites to group.
        gqa: ``"pool"`` gives keys and values the query heads, so that they share the queries'
            tensor; ``"split"`` gives keys and values another tensor if their head count differs.
        on_stream: whether the tensors act on the stream, whose width alone then matters.

    Raises:
        ValueError: ``gqa`` is unknown.
    """
    if gqa not in ("pool", "split"):
        raise ValueError(f"gqa must be 'pool' or 'split'; found {gqa!r}")
    members: dict[tuple[str, int, int, int, int], list[Site]] = defaultdict(list)
    for site in sites:
        heads = site.query_heads if gqa == "pool" else site.heads
        head_dim = site.width if on_stream else site.head_dim
        members[site.stack, heads, site.width, head_dim, site.experts].append(site)
    stacks = [stack for stack, *_ in members]
    groups: list[Group] = []
    for (stack, heads, width, head_dim, experts), found in members.items():
        name = stack.replace(".", "_")
        if stacks.count(stack) > 1:
            name += f"_{experts}x" * bool(experts) + f"_{heads}x{head_dim}_{width}"
        while any(group.name == name for group in groups):
            name += "_"
        layers = tuple(sorted({site.layer for site in found}))
        roles = tuple(sorted({site.role: None for site in found}, key=_order))
        groups.append(Group(name, heads, tuple(found), layers, roles, on_stream))
    return groups


def _order(role: str) -> int:
    """Return the position of a role on the mode ``matrix``; unknown roles come last, in their own order."""
    first = role.partition("+")[0]  # a fused projection on the stream has a role such as "q+k+v"
    return ROLES.index(first) if first in ROLES else len(ROLES)
