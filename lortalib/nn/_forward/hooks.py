"""Defines the hooks of an adapter: they add its updates, and mark where forwards begin and end."""

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
    """An update that a hook adds at a module: of an adapter, or of the rows of a bank's batch."""

    place: Place

    @property
    def is_on(self) -> bool:
        """True if the update is to be added now."""

    def __call__(self, x: Tensor, y: Tensor, may_write: bool = False) -> Tensor:
        """Return y with the update for x added."""


class UpdateHook(OutputHook):
    """A forward hook that adds an update to a module's output while the update is on.

    It is an object and not a closure, so that deepcopy and pickle can copy it. It holds no parameters,
    which belong to the adapter, and keeps no tensor after the forward.
    """

    def __init__(self, update: Update) -> None:
        self.update = update

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the module's output with the update added, as torch calls a forward hook."""
        if not self.update.is_on:
            return None
        if isinstance(output, tuple):  # quantised layers return their scale beside the output
            return (self._added(module, _input_of(module, args), output[0]), *output[1:])
        return self._added(module, _input_of(module, args), output)

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
    """A forward pre-hook that adds an update to a module's input while the update is on."""

    def __init__(self, update: Update) -> None:
        self.update = update

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Return the arguments with the update added to the first, as torch calls a forward pre-hook."""
        if not self.update.is_on:
            return None
        x = _input_of(module, args)
        before = _before_updates(module, Place.INPUT, x)
        after = self.update(before, x)
        _mark(module, Place.INPUT, after, before)
        return (after, *args[1:])


def _input_of(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """Return the input of a module, which is its first argument; torch's hooks get no others."""
    if not args:
        raise TypeError(
            f"a {type(module).__name__} that an adapter or a bank updates was called with keywords alone, as "
            "in linear(input=x), where its hooks find no input; pass the input by position, as in linear(x)"
        )
    x: Tensor = args[0]
    return x


def _mark(module: nn.Module, place: Place, after: Tensor, before: Tensor) -> None:
    """Mark a tensor with its value before any update, for the other hooks of the module."""
    after._lortalib_before = id(module), place.name, before  # type: ignore[attr-defined]


def _before_updates(module: nn.Module, place: Place, x: Tensor) -> Tensor:
    """Return a module's input or output without the updates that hooks added: every adapter computes its
    update from the same tensor, and the updates add up."""
    owner, where, before = getattr(x, "_lortalib_before", (None, None, x))
    return before if (owner, where) == (id(module), place.name) else x


def put_hook(module: nn.Module, update: Update) -> RemovableHandle:
    """Put a hook on a module that adds an update.

    Args:
        module: the module.
        update: the update; its ``place`` decides between input and output.
    """
    if update.place is Place.INPUT:
        return module.register_forward_pre_hook(InputHook(update))
    # An update that reads the output must run before other hooks add to the output in place.
    return module.register_forward_hook(UpdateHook(update), prepend=update.place is Place.OUTPUT)


@dataclass(frozen=True)
class ForwardBegin:
    """A forward pre-hook that marks the begin of a forward, on the modules around the sites."""

    scope: ForwardScope

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Tell the scope that the module's forward begins, as torch calls a forward pre-hook."""
        if not is_tracing():
            self.scope.begin(module, _caller())


@dataclass(frozen=True)
class ForwardEnd:
    """A forward hook that marks the end of a forward; torch calls it also if the forward raises."""

    scope: ForwardScope

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Tell the scope that the module's forward ends, as torch calls a forward hook."""
        if not is_tracing():
            self.scope.end(module)


def _caller() -> FrameType:
    """Return the frame of the module's call, which runs the hook."""
    return sys._getframe(2)


def watch_forwards(
    model: nn.Module, scope: ForwardScope, groups: Iterable[Group]
) -> Iterator[RemovableHandle]:
    """Put hooks on the modules around the sites that mark where a forward begins and ends.

    Yields:
        A handle for each hook, as soon as the hook is on its module.
    """
    for module in _around(model, groups):
        yield module.register_forward_pre_hook(ForwardBegin(scope))
        yield module.register_forward_hook(ForwardEnd(scope), always_call=True)


def by_module(sites: Iterable[Site]) -> Iterator[tuple[str, list[Site]]]:
    """Yield the path of every updated module with the sites of the module."""
    members: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        for path in (site.path, *site.tied_paths):
            members[path].append(site)
    yield from members.items()


def _around(model: nn.Module, groups: Iterable[Group]) -> list[nn.Module]:
    """List the modules that contain all sites of a group, the model first, and the parent of each site."""
    paths: dict[str, None] = {}
    for group in groups:
        parents = [p.rpartition(".")[0] for s in group.sites for p in (s.path, *s.tied_paths)]
        names = zip(*(parent.split(".") for parent in parents))
        shared = [each[0] for each in takewhile(lambda each: len(set(each)) == 1, names)]
        paths |= dict.fromkeys(".".join(shared[:depth]) for depth in range(len(shared) + 1))
        paths |= dict.fromkeys(parents)
    return list({id(module): module for module in map(model.get_submodule, paths)}.values())
