"""What one module adds to its output: the one body behind hooks, banks and PEFT's layers."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..._torch import has_global_forward_hooks, is_autocast, is_tracing
from .._anatomy import Site, is_conv1d
from .pairs import ModuleSites, Pair, PairSource
from .scope import ForwardScope, Running, down

_unsafe_view = torch.ops.aten._unsafe_view.default


class UpdateOwner(Protocol):
    """Whose updates are added: an adapter, or a bank.

    Attributes:
        scope: the forward under way.
    """

    scope: ForwardScope

    @property
    def sources(self) -> Sequence[PairSource]:
        """What makes its pairs, one for each network."""


class AdapterLike(UpdateOwner, Protocol):
    """An owner that is switched on and off, and drops features in training."""

    training: bool

    @property
    def adds_update(self) -> bool:
        """Whether the forward under way adds its update."""

    @property
    def dropout(self) -> float:
        """Probability of dropping an input feature in training."""

    def delta(self, site: Site | str, weight: Tensor | None = None) -> Tensor:
        """The dense update of one weight, which is the base's."""


class Slot(NamedTuple):
    """A module's place in one network.

    Attributes:
        source: what makes its pairs.
        number: the number of its signature there.
        layer: position on the mode ``layer``.
    """

    source: PairSource
    number: int
    layer: int


def slots_of(owner: UpdateOwner, sites: Sequence[Site]) -> list[Slot]:
    """The slots of one module; several where its sites are in several groups."""
    slots = []
    for source in owner.sources:
        own = tuple(site for site in sites if site in source.group.members)
        if own:
            module = ModuleSites(source.group, own)
            slots.append(Slot(source, source.add(module), module.layer))
    return slots


class Place(Enum):
    """Where a module's update reads and where it is added."""

    BESIDE = "reads the input, is added to the output"
    INPUT = "reads the input and is added to it"
    OUTPUT = "reads the output without its bias, and is added to it"


def place_of(slots: Sequence[Slot]) -> Place:
    """Where the update of a module with these slots belongs: beside its weight, or on the stream."""
    module = slots[0].source.signature(slots[0].number)
    if not module.group.on_stream:
        return Place.BESIDE
    return Place.OUTPUT if module.sites[0].writer else Place.INPUT


def without_bias(module: nn.Module, y: Tensor) -> Tensor:
    """The output of a linear map without its bias, which is no product with the weight."""
    bias: object = getattr(module, "bias", None)
    if callable(bias) and not isinstance(bias, Tensor):  # as torch's quantised linear maps have it
        bias = bias()
    return y - bias.to(y.dtype) if isinstance(bias, Tensor) else y


class ModuleUpdate:
    """The update of one module: ``update(x, y)`` is y with the update for x added.

    Args:
        owner: the adapter.
        sites: the sites of the module.

    Attributes:
        place: what x and y are: the module's input and its output, or the same one of them twice.
    """

    def __init__(self, owner: AdapterLike, sites: Sequence[Site]) -> None:
        self.owner = owner
        self.sites = tuple(sites)
        self.slots = slots_of(owner, sites)
        self.place = place_of(self.slots)

    @property
    def is_on(self) -> bool:
        """Whether the forward under way adds the update."""
        return self.owner.adds_update

    def __call__(self, x: Tensor, y: Tensor, may_write: bool = False) -> Tensor:
        """Add the update.

        Args:
            x: what it reads, (..., features).
            y: what it is added to, (..., features).
            may_write: whether nobody else uses y, so that it can be added to in place.
        """
        owner = self.owner
        p = owner.dropout if owner.training else 0.0
        running = None if is_tracing() else owner.scope.running
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
        """The whole update as one pair: first (p, features of x), second (p, features of y).

        Args:
            dtype: of the result.
            device: of the result; that of the factors by default.
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
) -> Tensor:
    """``y + (x @ first^T) @ second``.

    Args:
        running: the forward under way, in which x is read once for modules that share it.
        x: a module's input.
        y: its output.
        pair: first and second.
        users: how many modules of a layer have this first.
        p: probability of dropping a feature of x.
        may_write: whether nobody else uses y, so that it can be added to in place.
    """
    first, second = pair
    h = down(x, first, p) if running is None else running.product_of(x, first, users, p)
    return add_up(y, h, second, may_write)


def add_up(y: Tensor, h: Tensor, b: Tensor, may_write: bool) -> Tensor:
    """``y + h @ b``.

    Args:
        y: (..., features).
        h: (..., p).
        b: (p, features), or (rows, p, features) where each row of a batch has a map of its own.
        may_write: whether nobody else uses y, so that it can be added to in place; never while torch traces.
    """
    if b.dim() == 3:
        return _add_by_row(y, h, b, may_write)
    if not y.is_contiguous():
        return y + h @ b
    if not may_write:
        if y.dtype == h.dtype == b.dtype and not is_autocast(y.device.type):
            # One pass over y less than a product and a sum.
            return torch.addmm(y.view(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), b).view(y.shape)
        return y + h @ b
    if not torch.is_grad_enabled():
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), b)
        return y
    # Not as a view: autograd would copy the gradient for writing to one.
    flat = _unsafe_view(y, (-1, y.shape[-1]))
    flat.addmm_(h.reshape(-1, h.shape[-1]), b)
    return _unsafe_view(flat, y.shape)  # type: ignore[no-any-return]


def _add_by_row(y: Tensor, h: Tensor, b: Tensor, may_write: bool) -> Tensor:
    """`add_up` with a map for each of the rows that share y evenly."""
    if may_write and y.is_contiguous() and not torch.is_grad_enabled():
        y.view(len(b), -1, y.shape[-1]).baddbmm_(h, b)
        return y
    return y + (h @ b).view(y.shape)


class OutputHook:
    """A forward hook that adds to a module's output and keeps nothing of it."""


def may_write_output(module: nn.Module) -> bool:
    """Whether the output of a module is a fresh tensor that nobody but the hooks of updates has seen.

    Autograd does not need the output of a linear map, so it can then be added to in place. Never while
    torch traces, which follows plain operations only.
    """
    return (
        not is_tracing()
        and (type(module) is nn.Linear or is_conv1d(module))
        and "forward" not in module.__dict__
        and not has_global_forward_hooks()
        and (
            len(module._forward_hooks) < 2  # the one that asks
            or all(isinstance(hook, OutputHook) for hook in module._forward_hooks.values())
        )
    )
