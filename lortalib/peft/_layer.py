"""Wraps one module for PEFT, with the same arithmetic as the hooks of `lortalib.nn`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Union, cast

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
    onload_layer,
)
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.functional import pad

from .._torch import integers, is_tracing
from ..nn import Adapter, Site
from ..nn.door import (
    ModuleUpdate,
    Pair,
    Place,
    add_update,
    check_stored,
    divided_like,
    execution_device,
    is_finite,
    may_write_output,
    without_bias,
)


@dataclass
class AdapterSlot:
    """The update of one adapter in one module.

    Attributes:
        adapter: the adapter.
        sites: the adapter's sites in the module.
        update: the update that the module adds.
        tied: whether the module shares its weight with another layer, which does the merging.
    """

    adapter: Adapter
    sites: list[Site]
    update: ModuleUpdate
    tied: bool = False


class LortaLayer(nn.Module, BaseTunerLayer):
    """Wraps a linear module and adds the updates of adapters to its output.

    The tuner owns the trainable parameters. A layer only refers to them, so that each parameter is
    registered, saved and counted once.

    Attributes:
        base_layer: the module of the base.
        lorta_networks: for each adapter the networks whose pairs the layer uses.
        lorta_slots: for each adapter its update.

    Example:
        >>> import peft, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> base = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4))
        >>> config = lortalib.peft.LortaConfig(decomposition="cp", rank=2, target_modules="qv")
        >>> model = peft.get_peft_model(base, config)
        >>> layer = model.base_model.model.encoder.layer[0].attention.self.query
        >>> isinstance(layer, lortalib.peft.LortaLayer), layer.get_delta_weight("default").shape
        (True, torch.Size([32, 32]))
    """

    lorta_networks: nn.ModuleDict
    adapter_layer_names = ("lorta_networks",)
    other_param_names = ("lorta_slots",)

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), **quantization
        )
        features: tuple[Any, Any] = _get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = features
        # nn.Module's registration is bypassed, because it would save the tuner's parameters once more.
        self.__dict__["lorta_networks"] = nn.ModuleDict()
        self.lorta_slots: dict[str, AdapterSlot] = {}
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None

    def add(self, name: str, adapter: Adapter, sites: Sequence[Site], tied: bool = False) -> None:
        """Add an adapter to the layer.

        Args:
            name, adapter, sites, tied: the fields of `AdapterSlot`.
        """
        slot = AdapterSlot(adapter, list(sites), ModuleUpdate(adapter, sites), tied)
        self.lorta_slots[name] = slot
        self.lorta_networks[name] = nn.ModuleList(
            cast(nn.Module, place.source.network) for place in slot.update.slots
        )

    def sites(self) -> dict[str, list[Site]]:
        """List the sites of every adapter by its name."""
        return {name: slot.sites for name, slot in self.lorta_slots.items()}

    def forget(self, name: str) -> None:
        """Remove the adapter ``name`` from the layer; if the layer does not have it, nothing happens."""
        self.lorta_slots.pop(name, None)
        if name in self.lorta_networks:
            del self.lorta_networks[name]

    @property
    def device(self) -> torch.device:
        """The device that the base layer computes on, to which accelerate brings an offloaded weight."""
        return execution_device(self.base_layer, self.weight)

    @property
    def is_offloaded(self) -> bool:
        """True if accelerate offloads the weight of the base layer, which is then on the meta device."""
        return self.device != self.weight.device

    # What it computes

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the base layer with the updates of the active adapters added."""
        names = kwargs.pop("adapter_names", None)
        if names is not None:
            self._check_names(x, names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or (names is None and self.merged):
            return self.base_layer(x, *args, **kwargs)
        read = self._added(Place.INPUT, x, x, names)
        output = self.base_layer(read, *args, **kwargs)
        if isinstance(output, tuple):  # some quantised layers return (output, scale)
            return (self._with_updates(x, output[0], names), *output[1:])
        return self._with_updates(x, output, names)

    def _with_updates(self, x: Tensor, y: Tensor, names: Sequence[str] | None) -> Tensor:
        """Return the output of the base layer with the updates added."""
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        own = may_write_output(self.base_layer)
        if any(slot.update.place is Place.OUTPUT for slot in self.lorta_slots.values()):
            written = without_bias(self.get_base_layer(), y)
            y = self._added(Place.OUTPUT, written, y, names)
        return self._added(Place.BESIDE, x, y, names, own)

    def _added(
        self, place: Place, x: Tensor, y: Tensor, names: Sequence[str] | None, own: bool = False
    ) -> Tensor:
        """Return y with the updates for x of all adapters whose updates have this place."""
        if names is not None:
            return self._add_by_row(place, x, y, names, own)
        for name in self.active_adapters:
            slot = self.lorta_slots.get(name)
            if slot is not None and slot.update.place is place:
                y = slot.update(x, y, own)
                own = place is Place.BESIDE
        return y

    def _check_names(self, x: Tensor, names: Sequence[str]) -> None:
        if len(x) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )

    def _add_by_row(
        self, place: Place, x: Tensor, y: Tensor, names: Sequence[str], own: bool
    ) -> Tensor:
        """Add the update of its own adapter to every row, with two products for all rows."""
        here = {name for name, slot in self.lorta_slots.items() if slot.update.place is place}
        used = [name for name in dict.fromkeys(names) if name in here]
        if not used:
            return y
        pairs = [self.lorta_slots[name].update.pair(y.dtype, y.device) for name in used]
        p = max(len(first) for first, _ in pairs)
        firsts, seconds = (
            torch.stack([pad(side, (0, 0, 0, p - len(side))) for side in sides])
            for sides in zip(*pairs)
        )
        none = len(used)  # a row without an adapter adds zero
        rows = [used.index(name) if name in used else none for name in names]
        if none in rows:
            firsts, seconds = (pad(side, (0, 0, 0, 0, 0, 1)) for side in (firsts, seconds))
        index = _row_index(tuple(rows), y.device)
        return add_update(None, x, y, Pair(firsts[index], seconds[index]), 1, 0.0, own)

    # In the weight

    @property
    def unmerged_weight(self) -> Tensor:
        """The base's weight, without any merged update."""
        weight: Tensor = self.get_base_weight() if self._unmerged is None else self._unmerged
        return weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update of ``adapter``, a name, as a dense tensor in the shape of the stored weight."""
        slot = self.lorta_slots[adapter]
        delta = sum(slot.adapter.delta(site, self.unmerged_weight) for site in slot.sites)
        assert isinstance(delta, Tensor)
        return delta.to(self.device)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of adapters to the weight; the base's weight is kept for `unmerge`.

        Args:
            safe_merge: whether to refuse a result that is not finite.
            adapter_names: names of the adapters; the active adapters by default.

        Raises:
            ValueError: ``safe_merge`` is set and the result is not finite; the weight is then unchanged.
        """
        if self.is_offloaded:
            with onload_layer(self):
                self.merge(safe_merge, adapter_names)
            return
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lorta_slots:
                continue
            if self.lorta_slots[name].tied:
                self.merged_adapters.append(name)
                continue
            weight = self.get_base_weight()
            delta = divided_like(self.get_delta_weight(name), weight)
            wide = torch.promote_types(weight.dtype, delta.dtype)
            merged = (weight.to(wide) + delta.to(wide)).to(weight.dtype)
            if safe_merge and not is_finite(merged):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            kept = weight.clone() if self._unmerged is None else self._unmerged
            self._write(merged)
            self._unmerged = kept
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base's weight bit for bit.

        Raises:
            RuntimeError: FSDP2 has gathered the weight.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self.is_offloaded:
            with onload_layer(self):
                self.unmerge()
            return
        if self._unmerged is not None:
            weight = self.get_base_weight()
            self._write(self._unmerged.to(weight.device, weight.dtype))
            self._unmerged = None
        self.merged_adapters.clear()

    def _write(self, weight: Tensor) -> None:
        """Set the weight of the base layer; a weight that FSDP2 divides is copied into FSDP2's memory."""
        base = self.get_base_layer()
        check_stored(base, "weight", f"a {type(base).__name__} that was merged")
        own = self.get_base_weight()
        if hasattr(own, "device_mesh") != hasattr(weight, "device_mesh"):
            raise RuntimeError(
                "FSDP2 has gathered this weight for a forward, or divided it since it was merged, so a "
                "change would be lost. Call merge_adapter and unmerge_adapter outside of the forward, and "
                "reshard() on the outermost model before each"
            )
        if hasattr(own, "device_mesh"):
            own.copy_(weight)
        else:
            self.set_base_weight(weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True, because every update is a matrix."""
        return True

    # What PEFT's other calls need to know

    def _networks(self, names: Union[str, Sequence[str]] | None = None) -> Iterator[Any]:
        wanted = [names] if isinstance(names, str) else names
        for name, networks in self.lorta_networks.items():
            if wanted is None or name in wanted:
                yield from cast("nn.ModuleList", networks)

    def _freeze_non_trainable_peft_weights(
        self, adapter_names: Union[str, Sequence[str]] | None = None
    ) -> None:
        for network in self._networks(adapter_names):
            for tensor, term in zip(network.stored, network.legs.terms):
                if term.frozen:
                    tensor.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move factors that were read into main memory to the device of the first of their modules."""
        target = self.device if device is None or device.type == "meta" else device
        for network in self._networks(adapter_name):
            if network.stored[0].device.type == "cpu" and target.type != "meta":
                network.to(target)

    def __repr__(self) -> str:
        return "lorta." + super().__repr__()

    def extra_repr(self) -> str:
        """Return the names of the adapters and the quantisation of the base, for ``repr``."""
        names = ", ".join(self.lorta_slots)
        return f"adapters=[{names}]" + str(quantization_extra_repr(self) or "")


class LortaLinear(LortaLayer):
    """The same layer under a name with which PEFT recognises a wrapped linear module ("all-linear")."""


def _row_index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Make the indices of the rows of a batch. All layers use the same tensor, because a copy of numbers to a
    GPU waits for the GPU."""
    return integers(rows, device) if is_tracing() else _known_row_index(rows, device)


@lru_cache(maxsize=8)
def _known_row_index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # later batches use the tensor in any mode
        return integers(rows, device)
