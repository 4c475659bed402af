"""Puts the hooks of an adapter on a model, and removes them with torch's own handles."""

from __future__ import annotations

from typing import Protocol, Union

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..._torch import forget_compiled
from .._group import Group
from .added_weight import WeightHandle, add_to_weight
from .hooks import by_module, put_hook, watch_forwards
from .places import Places
from .update import AdapterLike, ModuleUpdate

Handle = Union[RemovableHandle, WeightHandle, Places]


class AttachableAdapter(AdapterLike, Protocol):
    """The interface of an adapter that its hooks use."""

    groups: tuple[Group, ...]


def attach(model: nn.Module, adapter: AttachableAdapter, handles: list[Handle]) -> None:
    """Put hooks on a model that add the adapter's updates while the adapter is on.

    Args:
        model: the model.
        adapter: the adapter.
        handles: a list that gets the handle of each hook. If this call fails, no hook stays on the model.
    """
    try:
        for handle in watch_forwards(model, adapter.scope, adapter.groups):
            handles.append(handle)
        members = dict(by_module(s for group in adapter.groups for s in group.sites))
        for path, sites in members.items():
            module = model.get_submodule(path)
            if sites[0].weight_read_directly:
                for site in sites:
                    handles.append(add_to_weight(module, adapter, site))
            else:
                handles.append(put_hook(module, ModuleUpdate(adapter, sites)))
        handles.append(adapter.scope.place(model, members))
        for source in adapter.sources:
            source.prepare()
    except BaseException:
        detach(handles)
        raise
    finally:
        forget_compiled()


def detach(handles: list[Handle]) -> None:
    """Remove the hooks that `attach` put on, last first; an interrupt comes out when none is left."""
    if not handles:
        return
    try:
        _remove_all(handles)
    except BaseException:
        _remove_all(handles)
        raise
    finally:
        forget_compiled()


def _remove_all(handles: list[Handle]) -> None:
    while handles:
        handles[-1].remove()
        handles.pop()
