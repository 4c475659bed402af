"""Adds an adapter's update to a weight whenever other code reads the weight, instead of by a hook.

A few modules need this because their forward is never called, such as the projections of
torch.nn.MultiheadAttention, and packed experts. The parameter keeps its place and name; the class of the
module becomes a subclass of the same name, with a property that returns weight plus update.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from ..._torch import is_interpreter_tracing
from .._anatomy import Site
from .update import AdapterLike

#: The attribute of a module that lists the updates of its weights as (adapter, site).
_UPDATES = "_lortalib_updates"
Updates = tuple[tuple[AdapterLike, Site], ...]


class WeightHandle:
    """Removes an adapter's update from a weight, as torch's handles remove hooks."""

    def __init__(self, module: nn.Module, adapter: AdapterLike, site: Site) -> None:
        self.module, self.adapter, self.site = module, adapter, site

    def remove(self) -> None:
        """Remove the update; may be called again."""
        updates: Updates = self.module.__dict__.get(_UPDATES, ())
        kept = tuple((a, s) for a, s in updates if a is not self.adapter or s != self.site)
        _set_updates(self.module, kept)


def add_to_weight(module: nn.Module, adapter: AdapterLike, site: Site) -> WeightHandle:
    """Add an adapter's update to a site's weight whenever the weight is read.

    Args:
        module: the module that has the weight.
        adapter: the adapter.
        site: the site.

    Raises:
        ValueError: the weight is computed from other parameters.
    """
    if module._parameters.get(site.parameter) is None:
        raise ValueError(
            f"the {site.parameter} of {site.path} is computed from other parameters (by "
            "torch.nn.utils.parametrize, weight_norm or prune) and read directly, where no update can be "
            "added to it. Make it an ordinary parameter first (parametrize.remove_parametrizations, "
            "prune.remove), or leave it out of targets"
        )
    handle = WeightHandle(module, adapter, site)
    try:
        _set_updates(module, (*module.__dict__.get(_UPDATES, ()), (adapter, site)))
    except BaseException:
        handle.remove()
        raise
    return handle


def _set_updates(module: nn.Module, updates: Updates) -> None:
    """Set the updates of a module, and the class that adds them."""
    cls = base_class(type(module))
    names = tuple(dict.fromkeys(site.parameter for _, site in updates))
    wanted = _reading_class(cast(Any, cls), names) if names else cls
    if names:
        module.__dict__[_UPDATES] = updates
    module.__class__ = wanted
    if not names:
        module.__dict__.pop(_UPDATES, None)


def base_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module has without updates."""
    base: type[nn.Module] = cls.__dict__.get("_lortalib_base", cls)
    return base


@cache
def _reading_class(cls: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """Make a subclass of the same name with a property that adds the updates for each of these weights."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = cls.__reduce_ex__(self, protocol)
        return (_restore, (cls, names), *reduced[2:])

    namespace: dict[str, Any] = {name: property(_reader(name)) for name in names}
    namespace |= {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce,
        "_lortalib_base": cls,
    }
    return type(cls.__name__, (cls,), namespace)


def _restore(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """Make a module for unpickling, which then fills in the attributes."""
    module = cls.__new__(cls)
    module.__class__ = _reading_class(cast(Any, cls), names)
    return module


#: Looks a parameter up by its path, and refuses what is none, such as a weight plus updates.
_LOOKUP = nn.Module.get_parameter.__code__

#: The files of functions that replace a weight by one which is computed from what they read.
_REPLACING = frozenset(
    function.__code__.co_filename
    for function in (register_parametrization, BasePruningMethod.apply, WeightNorm.remove)
)


def _reader(name: str) -> Any:
    def read(module: nn.Module) -> Tensor | None:
        weight: Tensor | None = module._parameters[name]
        asking = None if torch.compiler.is_compiling() else sys._getframe(1).f_code
        if asking is _LOOKUP:
            return weight
        if asking is not None and asking.co_filename in _REPLACING:
            raise RuntimeError(
                f"{asking.co_name} would take the weight {name!r} together with the updates of adapters for "
                "the base's; remove the adapters first, or merge them, if the weight is to have their updates"
            )
        try:
            return _updated(module, name, weight)
        except AttributeError as error:  # nn.Module would answer it with the weight alone
            raise RuntimeError(
                f"the update of the weight {name!r} could not be computed: {error}"
            ) from error

    return read


def _updated(module: nn.Module, name: str, weight: Tensor | None) -> Tensor | None:
    """Return a weight of a module with the updates of the adapters that are on."""
    for adapter, site in module.__dict__.get(_UPDATES, ()):
        if site.parameter == name and adapter.adds_update:
            assert weight is not None
            if is_interpreter_tracing():
                raise RuntimeError(
                    f"torch.jit.trace cannot follow the update of {site.path}.{name}, a weight that is read "
                    "directly; merge() the adapter, then trace, or use torch.export or torch.compile"
                )
            update = adapter.delta(site, module._parameters[name])
            weight = weight + update.to(weight.device, weight.dtype)
    return weight
