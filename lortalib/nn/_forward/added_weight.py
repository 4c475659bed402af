"""Adds an adapter's update to a weight that is read directly, by a parametrization.

For the few modules whose forward is never called, such as the projections of
torch.nn.MultiheadAttention.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.utils.parametrize import (
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
)

from .._anatomy import Site
from .update import AdapterLike


class AddedWeight(nn.Module):
    """A parametrization: adds the dense updates of the active adapters to a weight.

    One stands on a weight for all adapters of the model.
    """

    def __init__(self, order: Iterable[str]) -> None:
        super().__init__()
        self.updates: list[tuple[AdapterLike, Site]] = []
        self.order = tuple(order)  # of the module's parameters before the weight was parametrized

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the updates of the active adapters."""
        for adapter, site in self.updates:
            if adapter.active and not adapter.merged:
                weight = weight + adapter.delta(site).to(weight.device, weight.dtype)
        return weight


class WeightHandle:
    """Takes an adapter's update off a weight, as torch's handles take off hooks."""

    def __init__(self, module: nn.Module, adapter: AdapterLike, site: Site) -> None:
        self.module, self.adapter, self.site = module, adapter, site

    def remove(self) -> None:
        """Take the update off; may be called again."""
        module, name = self.module, self.site.parameter
        if not is_parametrized(module, name):
            return
        added = _added(module, name)
        kept = [(a, s) for a, s in added.updates if a is not self.adapter or s != self.site]
        added.updates = kept
        if not kept:
            remove_parametrizations(module, name, leave_parametrized=False)
            for other in added.order:
                if other in module._parameters:
                    module._parameters[other] = module._parameters.pop(other)


def add_to_weight(module: nn.Module, adapter: AdapterLike, site: Site) -> WeightHandle:
    """Let a site's weight be read with the adapter's update."""
    name, handle = site.parameter, WeightHandle(module, adapter, site)
    try:
        if not is_parametrized(module, name):
            order = list(module._parameters)
            if is_parametrized(module):
                first = next(iter(module.parametrizations.values()))[0]  # type: ignore[union-attr, operator]
                order = list(first.order)
            register_parametrization(module, name, AddedWeight(order), unsafe=True)
        _added(module, name).updates.append((adapter, site))
    except BaseException:
        handle.remove()
        raise
    return handle


def _added(module: nn.Module, name: str) -> AddedWeight:
    added = module.parametrizations[name][0]  # type: ignore[index, union-attr]
    assert isinstance(added, AddedWeight)
    return added
