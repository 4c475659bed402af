"""What all adapters of one model share: the base's weights while something is merged, its
``requires_grad`` flags, and who owns a module that trains beside an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ._names import ATTRIBUTE
from ._share import site_weight
from ._site import Site

if TYPE_CHECKING:
    from ._adapter import Adapter


class Host(nn.ModuleDict):
    """The adapters of one model by name; a submodule of the model, so that they move with it.

    Merged weights are always recomputed from the base's own, which are kept here as they were: so
    adapters can be merged and unmerged in any order, and the last unmerge restores every bit.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that it is not registered as a submodule
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._base: dict[str, Tensor] = {}

    @property
    def model(self) -> nn.Module:
        """The model that carries the adapters."""
        return self._model[0]

    def adapters(self) -> Iterator[Adapter]:
        """Every adapter, in the order in which they were applied."""
        return iter(cast("Iterable[Adapter]", self.values()))

    def remerge(self, sites: Iterable[Site]) -> None:
        """Set the weights of these sites to the base's plus the updates of all merged adapters.

        Raises:
            ValueError: a weight that is quantised, or a result that is not finite; then every
                weight is as it was before the call.
        """
        written: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for site in {_weight_name(site): site for site in sites}.values():
                weight = self._weight(site)
                old = weight.detach().clone()
                written.append((weight, old))
                with torch.no_grad():
                    weight.copy_(self._merged(site, old))
        except Exception:
            with torch.no_grad():
                for weight, old in written:
                    weight.copy_(old)
            raise
        self.prune()

    def prune(self) -> None:
        """Forget the kept weights of sites that no adapter is merged into."""
        merged = {
            _weight_name(site)
            for adapter in self.adapters()
            if adapter.merged
            for site in adapter.sites
        }
        self._base = {path: base for path, base in self._base.items() if path in merged}

    def settle(self, adapter: Adapter) -> None:
        """Let the update of a merged adapter become part of the base."""
        for site in adapter.sites:
            base = self._base[_weight_name(site)]
            wide = torch.promote_types(base.dtype, torch.float32)
            update = adapter.delta(site).detach().to(base.device, wide)
            self._base[_weight_name(site)] = (base.to(wide) + update).to(base.dtype)
        adapter.merged = False
        self.prune()

    def _merged(self, site: Site, current: Tensor) -> Tensor:
        base = self._base.setdefault(_weight_name(site), current).to(current.device)
        updates = [
            adapter.delta(adapter_site)
            for adapter in self.adapters()
            if adapter.merged
            for adapter_site in adapter.sites
            if adapter_site.path == site.path and adapter_site.parameter == site.parameter
        ]
        if not updates:
            return base.to(current.dtype)
        wide = torch.promote_types(base.dtype, torch.float32)
        total = base.to(wide)
        for update in updates:
            total = total + update.to(base.device, wide)
        merged = total.to(current.dtype)  # the model may have been cast since it was merged
        if not torch.isfinite(merged).all() and torch.isfinite(base).all():
            raise ValueError(
                f"merging would write NaN or infinity into {site.path} ({current.dtype}); nothing was "
                "changed. Look at the adapter's factors, or merge into a wider dtype"
            )
        return merged

    def _weight(self, site: Site) -> nn.Parameter:
        weight = site_weight(self.model, site)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ValueError(
                f"the weight of {site.path} is quantised ({weight.dtype}); it cannot take an update. "
                "Merge into the unquantised model instead"
            )
        if tuple(weight.shape) != site.weight_shape:
            raise ValueError(
                f"the weight of {site.path} has shape {tuple(weight.shape)}; expected "
                f"{site.weight_shape}, so it cannot take an update"
            )
        return weight

    def release(self) -> None:
        """Take the host off the model and give back the ``requires_grad`` flags of the base."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))
        delattr(self.model, ATTRIBUTE)


def _weight_name(site: Site) -> str:
    return f"{site.path}.{site.parameter}"


def host_of(model: nn.Module) -> Host | None:
    """The host of a model, if any adapter was applied to it."""
    host = model._modules.get(ATTRIBUTE)
    return host if isinstance(host, Host) else None


def require_host(model: nn.Module) -> Host:
    """The host of a model, made and attached where there is none.

    Raises:
        ValueError: the model has an attribute of that name that is something else.
    """
    host = host_of(model)
    if host is None:
        if hasattr(model, ATTRIBUTE):
            raise ValueError(
                f"the model has an attribute {ATTRIBUTE!r} that is no adapter; rename it first"
            )
        host = Host(model)
        model.add_module(ATTRIBUTE, host)
    return host
