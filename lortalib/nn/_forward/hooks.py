"""The hooks of an adapter: they add its updates, and mark where forwards begin and end."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from types import FrameType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..._torch import is_tracing
from .._anatomy import Site
from .._group import Group
from .scope import ForwardScope
from .update import ModuleUpdate, OutputHook, may_write_output


class UpdateHook(OutputHook):
    """A forward hook: adds a module's update while its adapter is active and not merged.

    An object and not a closure, so that it follows deepcopy and pickle. It holds no parameter: these
    belong to the adapter, and nothing of one forward outlives it.
    """

    def __init__(self, update: ModuleUpdate) -> None:
        self.update = update

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Torch's forward hook: the module's output with the update added."""
        update = self.update
        if not update.is_on:
            return None
        if isinstance(output, tuple):  # quantised layers return their scale beside the output
            return (update(args[0], output[0], may_write_output(module)), *output[1:])
        return update(args[0], output, may_write_output(module))


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
