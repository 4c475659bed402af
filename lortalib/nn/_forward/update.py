"""Adds the update of one module to its output; hooks, banks and PEFT's layers all use this code."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..._torch import has_global_forward_hooks, is_recorded
from .._anatomy import Site, is_conv1d
from .._offloaded import offloaded_numbers
from .module_sites import ModuleSites, Pair
from .pairs import PairSource
from .rows import RowMaps
from .scope import ForwardScope, Running
from .thin_products import add_up, down


class UpdateOwner(Protocol):
    """An adapter or a bank whose updates are added."""

    @property
    def scope(self) -> ForwardScope:
        """The scope of its forwards."""

    @property
    def sources(self) -> Sequence[PairSource]:
        """The sources of the low-rank pairs, one for each network."""


class AdapterLike(UpdateOwner, Protocol):
    """An adapter: it can be switched on and off, and drops features in training."""

    training: bool

    @property
    def adds_update(self) -> bool:
        """True if the forward under way adds the adapter's update."""

    @property
    def dropout(self) -> float:
        """The probability of dropping an input feature in training."""

    def delta(self, site: Site | str, weight: Tensor | None = None) -> Tensor:
        """Return the dense update of one weight; ``weight`` is the base's."""


class Slot(NamedTuple):
    """The position of a module in one network.

    Attributes:
        source: the source of the network's pairs.
        number: the number of the module's signature in the source.
        layer: position on the mode ``layer``.
    """

    source: PairSource
    number: int
    layer: int


def slots_of(owner: UpdateOwner, sites: Sequence[Site]) -> list[Slot]:
    """Find the slots of one module; a module has several if its sites are in several groups, or if rows of a
    batch have a middle of their own for each site."""
    slots = []
    for source in owner.sources:
        own = tuple(site for site in sites if site in source.group.members)
        for part in source.parts(own) if own else ():
            module = ModuleSites(source.group, part)
            slots.append(Slot(source, source.add(module), module.layer))
    return slots


class Place(Enum):
    """The tensors that a module's update reads and is added to."""

    BESIDE = "reads the input, is added to the output"
    INPUT = "reads the input and is added to it"
    OUTPUT = "reads the output without its bias, and is added to it"


def place_of(slots: Sequence[Slot]) -> Place:
    """Return the place of the update of a module with these slots: beside its weight, or on the stream."""
    module = slots[0].source.signature(slots[0].number)
    if not module.group.on_stream:
        return Place.BESIDE
    return Place.OUTPUT if module.sites[0].writer else Place.INPUT


def without_bias(module: nn.Module, y: Tensor) -> Tensor:
    """Subtract the bias from the output of a linear map, which leaves the product with the weight."""
    bias: object = getattr(module, "bias", None)
    if callable(bias) and not isinstance(bias, Tensor):  # a method in quantised modules
        bias = bias()
    if isinstance(bias, Tensor) and bias.is_meta and not y.is_meta:
        # accelerate keeps the numbers elsewhere, and its hook has left already
        kept = offloaded_numbers(module, "bias")
        bias = bias if kept is None else kept.to(y.device)
    return y - bias.to(y.dtype) if isinstance(bias, Tensor) else y


class ModuleUpdate:
    """The update of one module: ``update(x, y)`` returns y with the update for x added.

    Args:
        owner: the adapter.
        sites: the sites of the module.

    Attributes:
        place: says whether x and y are the module's input and output, or one of the two tensors twice.
    """

    def __init__(self, owner: AdapterLike, sites: Sequence[Site]) -> None:
        self.owner = owner
        self.sites = tuple(sites)
        self.slots = slots_of(owner, sites)
        self.place = place_of(self.slots)

    @property
    def is_on(self) -> bool:
        """True if the forward under way adds the update."""
        return self.owner.adds_update

    def __call__(self, x: Tensor, y: Tensor, may_write: bool = False) -> Tensor:
        """Add the update for x to y.

        Args:
            x: the tensor that the update reads, (..., features).
            y: the tensor that the update is added to, (..., features).
            may_write: whether y may be changed in place, because no other code uses it.
        """
        owner = self.owner
        p = owner.dropout if owner.training else 0.0
        running = None if is_recorded() else owner.scope.running
        dtype, device = y.dtype, y.device
        for source, number, layer in self.slots:
            if running is None:
                pair = source.pair(number, layer, dtype, device)
            else:
                pair = running.pair(source, number, layer, dtype, device)
            y = add_update(running, x, y, pair, source.users(number), p, may_write)
            may_write = running is not None
        return y

    def pair(self, dtype: torch.dtype, device: torch.device | None = None) -> Pair:
        """Return the whole update as one pair: first (p, features of x), second (p, features of y).

        Args:
            dtype: dtype of the result.
            device: device of the result; the device of the factors by default.
        """
        pairs = [s.source.pair(s.number, s.layer, dtype, device) for s in self.slots]
        return pairs[0] if len(pairs) == 1 else Pair(*map(torch.cat, zip(*pairs)))


def add_update(
    running: Running | None,
    x: Tensor,
    y: Tensor,
    pair: Pair,
    users: int,
    p: float,
    may_write: bool,
    rows: RowMaps | None = None,
) -> Tensor:
    """Compute ``y + (x @ first^T) @ second``; rows of a batch may have a middle between the two.

    Args:
        running: the forward under way; it computes ``x @ first^T`` once for modules that share it.
        x: a module's input.
        y: the module's output.
        pair: the low-rank pair (first, second).
        users: number of modules of a layer that have this first.
        p: probability of dropping a feature of x.
        may_write: whether y may be changed in place, because no other code uses it.
        rows: the middles of the rows of a batch, and the arrangement of the tokens in rows.
    """
    first, second = pair
    layout = None if rows is None else rows.layout
    h = (
        down(x, first, p, layout)
        if running is None
        else running.product_of(x, first, users, p, layout)
    )
    if rows is not None:
        h = rows.apply(h, x.shape[:-1])
    return add_up(y, h, second, may_write, layout)


class OutputHook:
    """A forward hook that adds to a module's output and keeps no reference to it."""


def may_write_output(module: nn.Module) -> bool:
    """Return True if a module's output is a new tensor that only hooks of updates have seen.

    Such an output can be changed in place, because autograd does not need the output of a linear map.
    The answer is False while torch traces, which can follow only plain operations, and within a selective
    checkpoint, which can keep the output.
    """
    return (
        not is_recorded()
        and (type(module) is nn.Linear or is_conv1d(module))
        and "forward" not in module.__dict__
        and not has_global_forward_hooks()
        and (
            len(module._forward_hooks) < 2  # the hook that asks
            or all(isinstance(hook, OutputHook) for hook in module._forward_hooks.values())
        )
    )
