"""Keeps the base's weights while adapters are merged into the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ._anatomy import Site, check_stored, original_parameters, original_weight
from ._found_modules import FoundModules
from ._offloaded import is_on_disk, offloaded_numbers
from ._sharded import (
    check_gathered,
    divide_again,
    divided_like,
    is_finite,
    is_zero_parameter,
)


class Merged(Protocol):
    """The interface of an adapter that merging uses."""

    name: str

    @property
    def sites(self) -> list[Site]:
        """Every projection that the adapter updates."""

    def delta(self, site: Site | str, weight: Tensor | None = None) -> Tensor:
        """Return the dense update of one weight; ``weight`` is the base's."""


class BaseWeights:
    """Keeps the base's weights that adapters are merged into, and writes the merged weights.

    Every merged weight is computed from the base's weight, so adapters can be merged and unmerged in any
    order, and the last unmerge restores every bit.

    Args:
        model: the model.
        modules: finds the modules of the model.
    """

    def __init__(self, model: nn.Module, modules: FoundModules | None = None) -> None:
        self._model = model
        self._modules = FoundModules(model) if modules is None else modules
        self._base: dict[str, Tensor] = {}
        self._peft: dict[str, list[str]] = {}  # of each kept weight: what PEFT had merged into it

    def write(self, sites: Iterable[Site], merged: Sequence[Merged]) -> None:
        """Set the weights of these sites to the base's weights plus the updates of some adapters.

        Args:
            sites: the sites.
            merged: all adapters that are to be merged into these weights.

        Raises:
            ValueError: a weight is quantised, computed from other parameters, on a disk, shared with a
                module that is not updated alike, has an update of another model's adapter, or was written by
                PEFT since the base's was kept; or a result is not finite. After any error every weight is
                unchanged.
        """
        divide_again(self._model)
        updates = _by_weight(merged)
        named = {weight_name(site): site for site in sites}
        self._keep_alone(named.values())
        self._check_peft(named)
        weights = {name: self._weight(site, write=True) for name, site in named.items()}
        self._check_holders(weights, updates)
        written: list[tuple[Tensor, Tensor]] = []
        known = set(self._base)
        try:
            for name, weight in weights.items():
                present = weight.detach().clone()
                base = self._base.setdefault(name, present)
                self._peft.setdefault(name, self._merged_by_peft(named[name]))
                result = _sum(name, base, updates.get(name, []), weight.dtype)
                written.append((weight, present))
                _copy(result, weight)
        except BaseException:
            for weight, present in written:
                _copy(present, weight)
            self.forget(set(self._base) - known)
            raise

    def restore(self, sites: Iterable[Site]) -> None:
        """Restore the base's weights of these sites bit for bit. This allocates no memory, and may be called
        again after an interrupt.

        Raises:
            ValueError: since it was merged, a weight was quantised, is computed from other parameters, or
                PEFT has merged into it. Nothing is changed.
        """
        divide_again(self._model)
        named = {weight_name(site): site for site in sites}
        self._check_peft(named)
        for site in named.values():
            module = self._modules.get_submodule(site.path)
            check_stored(module, site.parameter, site.path)
            if not _holds_numbers(original_weight(module, site.parameter)):
                raise ValueError(
                    f"the weight of {site.path} was quantised after an update was merged into it, so the "
                    "base's numbers cannot be put back. Quantise first, then apply or load the adapter; or "
                    "make the update part of the base for good: remove(merged=True)"
                )
        for site in named.values():
            base = self._base.get(weight_name(site))
            if base is not None:
                _copy(base, self._stored(site))

    def base(self, site: Site) -> Tensor:
        """Return the base's weight of a site, also while adapters are merged into the model's weight.

        Raises:
            ValueError: the weight is quantised, computed from other parameters, or has another shape than
                the site.
        """
        kept = self._base.get(weight_name(site))
        return self._weight(site).detach() if kept is None else kept

    def keep_merged(self, adapter: Merged, rest: Sequence[Merged]) -> None:
        """Make the update of a merged adapter part of the base's weights.

        Args:
            adapter: the adapter.
            rest: the adapters that stay merged. Weights that they have in common with the adapter are
                computed again from the new base, as later calls would.

        Raises:
            ValueError: a result is not finite. After any error everything is as before.
        """
        before, new = self._base, {}
        for name, members in _by_weight([adapter]).items():
            new[name] = _sum(name, before[name], members, before[name].dtype)
        held = _by_weight(rest)
        try:
            self._base = before | new
            self.write([site for site in adapter.sites if weight_name(site) in held], rest)
        except BaseException:
            self._base = before
            raise

    def forget(self, names: Iterable[str]) -> None:
        """Drop the kept weights of these names."""
        gone = set(names)
        self._base = {name: base for name, base in self._base.items() if name not in gone}
        self._peft = {name: known for name, known in self._peft.items() if name in self._base}

    def keep_only(self, merged: Sequence[Merged]) -> None:
        """Drop the kept weights that none of these adapters is merged into."""
        self.forget(set(self._base) - set(_by_weight(merged)))

    def _stored(self, site: Site) -> Any:
        """Return the stored weight of a site, which accelerate may have offloaded."""
        module = self._modules.get_submodule(site.path)
        numbers = offloaded_numbers(module, site.parameter)
        return original_weight(module, site.parameter) if numbers is None else numbers

    def _weight(self, site: Site, write: bool = False) -> Tensor:
        module = self._modules.get_submodule(site.path)
        check_stored(module, site.parameter, site.path)
        weight = original_weight(module, site.parameter)
        if not isinstance(weight, nn.Parameter) or not _holds_numbers(weight):
            raise ValueError(
                f"the weight of {site.path} is quantised ({getattr(weight, 'dtype', type(module))}); it "
                "cannot take an update. Merge into the unquantised model instead"
            )
        if write and is_zero_parameter(weight):
            raise ValueError(
                f"the weight of {site.path} is divided by DeepSpeed ZeRO-3, which would take it for "
                "the base's. Save the adapter, and merge it into a model that is not divided (lortalib merge "
                "MODEL FOLDER OUT)"
            )
        check_gathered(weight)
        if tuple(weight.shape) != site.weight_shape:
            raise ValueError(
                f"the weight of {site.path} has shape {tuple(weight.shape)}; expected "
                f"{site.weight_shape}, so it cannot take an update"
            )
        if write and weight.is_meta and is_on_disk(module, site.parameter):
            raise ValueError(
                f"the weight of {site.path} is offloaded to a disk, which nothing is written to; load the "
                "model into memory (device_map='cpu') to merge, or leave the adapter unmerged"
            )
        found: Tensor = self._stored(site)
        if write and found.is_meta:
            raise ValueError(
                f"the weight of {site.path} is on the meta device: it has no numbers to add an update to"
            )
        return found

    def _merged_by_peft(self, site: Site) -> list[str]:
        """List the adapters that PEFT's layers around a module have merged into its weight."""
        around = self._model.get_submodule(site.path).modules()
        return [name for each in around for name in getattr(each, "merged_adapters", ())]

    def _check_peft(self, named: Mapping[str, Site]) -> None:
        """Refuse weights that PEFT has written since the base's were kept, which lack what PEFT wrote."""
        for name, site in named.items():
            now = self._merged_by_peft(site)
            before = self._peft.get(name, now)
            if now != before:
                raise ValueError(
                    f"PEFT had merged {before} into {site.path} when an update was merged into it, and has "
                    f"merged {now} now, so the base's weight that was kept is out of date. Take back PEFT's "
                    "change first (unmerge_adapter() or merge_adapter()), then unmerge here"
                )

    def _keeps(self, module: nn.Module) -> bool:
        """Return True if the base's weight of a module is kept, since adapters are merged into it."""
        paths = {name.rpartition(".")[0] for name in self._base}
        return any(self._modules.get_submodule(path) is module for path in paths)

    def _keep_alone(self, sites: Iterable[Site]) -> None:
        """Refuse modules whose base's weight is kept for the adapters of another model, which contains this
        one or is a part of it: each would take the other's update for the base's."""
        for site in sites:
            module = self._modules.get_submodule(site.path)
            keepers = _KEEPERS.setdefault(module, WeakSet())
            if any(other is not self and other._keeps(module) for other in keepers):
                raise ValueError(
                    f"an adapter of another model, which shares {site.path} with this one, is merged into "
                    "it. Unmerge that adapter first, or make it part of the base: remove(merged=True). "
                    "Adapters that were all applied to one model can be merged together"
                )
            keepers.add(self)

    def _check_holders(
        self,
        weights: Mapping[str, Tensor],
        updates: Mapping[str, Sequence[tuple[Merged, Site]]],
    ) -> None:
        """Refuse a weight that is shared with a module whose forward the update does not change."""
        holders: dict[object, dict[int, str]] = {_memory(weight): {} for weight in weights.values()}
        for path, module in self._model.named_modules(remove_duplicate=False):
            if isinstance(module, ParametrizationList):  # its parent module counts instead
                continue
            for name, parameter in original_parameters(module).items():
                numbers = offloaded_numbers(module, name)
                key = _memory(parameter if numbers is None else numbers)
                if key in holders:
                    holders[key].setdefault(id(module), path)
        for name, weight in weights.items():
            for adapter, site in updates.get(name, []):
                paths = (site.path, *site.tied_paths)
                own = {id(self._modules.get_submodule(path)) for path in paths}
                others = [path for key, path in holders[_memory(weight)].items() if key not in own]
                if others:
                    raise ValueError(
                        f"the weight of {site.path} is also that of {', '.join(sorted(others))}, which "
                        f"adapter {adapter.name!r} does not change in the same way; merging would change "
                        "both. Give the modules weights of their own first, or leave the adapter unmerged"
                    )


#: What keeps, or has kept, the base's weight of a module: one for each model that the module is part of.
_KEEPERS: WeakKeyDictionary[nn.Module, WeakSet[BaseWeights]] = WeakKeyDictionary()


def _memory(weight: Tensor) -> object:
    """Return a key that is equal for all modules that share a weight. accelerate keeps an offloaded weight as
    several tensors over one memory."""
    return id(weight) if isinstance(weight, nn.Parameter) else ("memory", weight.data_ptr())


def _holds_numbers(weight: Tensor) -> bool:
    """Return True for a weight of floating-point numbers. The quantised tensors of torchao report such a
    dtype too, and are excluded."""
    return weight.is_floating_point() and not type(weight).__module__.startswith("torchao")


def weight_name(site: Site) -> str:
    """Return the name of a site's weight in its model."""
    return f"{site.path}.{site.parameter}"


def _by_weight(merged: Sequence[Merged]) -> dict[str, list[tuple[Merged, Site]]]:
    """Group the adapters and sites by the name of their weight."""
    found: dict[str, list[tuple[Merged, Site]]] = {}
    for adapter in merged:
        for site in adapter.sites:
            found.setdefault(weight_name(site), []).append((adapter, site))
    return found


def _sum(
    name: str, base: Tensor, updates: Sequence[tuple[Merged, Site]], dtype: torch.dtype
) -> Tensor:
    """Add the updates to the base's weight, in float32 or a wider dtype."""
    wide = torch.promote_types(base.dtype, torch.float32)
    total = base.to(wide)
    for adapter, site in updates:
        delta = adapter.delta(site, base).detach().to(base.device, wide)
        total = total + divided_like(delta, base)
    result = total.to(dtype)  # the model may have been cast since the base's weight was kept
    if not is_finite(result) and is_finite(base):
        raise ValueError(
            f"merging would write NaN or infinity into {name.removesuffix('.weight')} ({dtype}); nothing was "
            "changed. Look at the adapter's factors, or merge into a wider dtype"
        )
    return result


def _copy(source: Tensor, target: Any) -> None:
    with torch.no_grad():
        target.copy_(divided_like(source, target))
