"""The hooks of an adapter: they add its updates, and mark where forwards begin and end."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from types import FrameType
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..._torch import is_tracing
from .._anatomy import Site
from .._group import Group
from .scope import ForwardScope
from .update import OutputHook, Place, may_write_output, without_bias


class Update(Protocol):
    """What is added at a module: an adapter's update, or that of a bank's rows."""

    place: Place

    @property
    def is_on(self) -> bool:
        """Whether it is to be added now."""

    def __call__(self, x: Tensor, y: Tensor, may_write: bool = False) -> Tensor:
        """Return y with the update for x added."""


class UpdateHook(OutputHook):
    """A forward hook: adds an update to a module's output while it is on.

    An object and not a closure, so that it follows deepcopy and pickle. It holds no parameter: these
    belong to the adapter, and nothing of one forward outlives it.
    """

    def __init__(self, update: Update) -> None:
        self.update = update

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Torch's forward hook: the module's output with the update added."""
        if not self.update.is_on:
            return None
        if isinstance(output, tuple):  # quantised layers return their scale beside the output
            return (self._added(module, args[0], output[0]), *output[1:])
        return self._added(module, args[0], output)

    def _added(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.update.place is Place.BESIDE:
            x = _before_updates(module, Place.INPUT, x)
            return self.update(x, y, may_write_output(module))
        before = _before_updates(module, Place.OUTPUT, y)
        after = self.update(without_bias(module, before), y)
        if len(module._forward_hooks) > 1:
            _mark(module, Place.OUTPUT, after, before)
        return after


class InputHook:
    """A forward pre-hook: adds an update to a module's input while it is on."""

    def __init__(self, update: Update) -> None:
        self.update = update

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Torch's forward pre-hook: the module's arguments with the update added to the first."""
        if not self.update.is_on:
            return None
        before = _before_updates(module, Place.INPUT, args[0])
        after = self.update(before, args[0])
        _mark(module, Place.INPUT, after, before)
        return (after, *args[1:])


def _mark(module: nn.Module, place: Place, after: Tensor, before: Tensor) -> None:
    """Let the other hooks of a module find what was there before any update was added to it."""
    after._lortalib_before = id(module), place.name, before  # type: ignore[attr-defined]


def _before_updates(module: nn.Module, place: Place, x: Tensor) -> Tensor:
    """The input or output of a module as it was before hooks added updates to it: the updates of several
    adapters add up, and none reads what another added."""
    owner, where, before = getattr(x, "_lortalib_before", (None, None, x))
    return before if (owner, where) == (id(module), place.name) else x


def put_hook(module: nn.Module, update: Update) -> RemovableHandle:
    """Let a module add an update from now on.

    Args:
        module: the module.
        update: what to add, where its place says.
    """
    if update.place is Place.INPUT:
        return module.register_forward_pre_hook(InputHook(update))
    # What reads the output has to see it before others add to it in place.
    return module.register_forward_hook(UpdateHook(update), prepend=update.place is Place.OUTPUT)


@dataclass(frozen=True)
class ForwardBegin:
    """A forward pre-hook of the modules around sites."""

    scope: ForwardScope

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Torch's forward pre-hook."""
        if not is_tracing():
            self.scope.begin(module, _caller())


@dataclass(frozen=True)
class ForwardEnd:
    """A forward hook of the modules around sites; torch calls it also where the forward raises."""

    scope: ForwardScope

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Torch's forward hook."""
        if not is_tracing():
            self.scope.end(module)


def _caller() -> FrameType:
    """The frame that calls the hook: that of the module's call."""
    return sys._getframe(2)


def watch_forwards(
    model: nn.Module, scope: ForwardScope, groups: Iterable[Group]
) -> Iterator[RemovableHandle]:
    """Let the modules around the sites say when their forward begins and ends.

    Yields:
        A handle for each hook, as soon as it is there.
    """
    for module in _around(model, groups):
        yield module.register_forward_pre_hook(ForwardBegin(scope))
        yield module.register_forward_hook(ForwardEnd(scope), always_call=True)


def by_module(sites: Iterable[Site]) -> Iterator[tuple[str, list[Site]]]:
    """Every module that is updated, by path, with its sites."""
    members: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        for path in (site.path, *site.tied_paths):
            members[path].append(site)
    yield from members.items()


def _around(model: nn.Module, groups: Iterable[Group]) -> list[nn.Module]:
    """The modules that hold all sites of a group, the model first, and the parent of each site."""
    paths: dict[str, None] = {}
    for group in groups:
        parents = [p.rpartition(".")[0] for s in group.sites for p in (s.path, *s.tied_paths)]
        names = zip(*(parent.split(".") for parent in parents))
        shared = [each[0] for each in takewhile(lambda each: len(set(each)) == 1, names)]
        paths |= dict.fromkeys(".".join(shared[:depth]) for depth in range(len(shared) + 1))
        paths |= dict.fromkeys(parents)
    return list({id(module): module for module in map(model.get_submodule, paths)}.values())
