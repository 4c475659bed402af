"""Holds the adapters of a model for PEFT, and wraps the target modules."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from ..decomp import Network
from ..nn import Adapter, Site, export_lora
from ..nn.door import (
    Handle,
    by_module,
    check_whole,
    describe_for_peft,
    detach,
    make_adapter,
    plan_sites,
    watch_forwards,
)
from ._config import LortaConfig
from ._held import PeftHost
from ._layer import LortaLayer, LortaLinear
from ._mergeable import prepare_to_merge, prepare_to_unmerge
from ._mixed_batch import BASE, named_rows, repeats_of
from ._sharded import weights_of
from ._sum import check_sum, describe_sum, weighted_sum, with_ranks
from ._targets import known_sites, named_targets, sites_of
from ._undo import Snapshot
from ._whole_modules import whole_modules


class LortaModel(BaseTuner):
    """Puts adapters on a model whose target modules share low-rank tensors; ``get_peft_model`` makes it.

    Attributes:
        lorta_adapters: the adapters by name, as `lortalib.nn.Adapter`; they own the trainable parameters.

    Example:
        >>> import peft, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> base = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4))
        >>> config = lortalib.peft.LortaConfig(decomposition="cp", rank=2, target_modules="qv")
        >>> model = peft.get_peft_model(base, config)
        >>> type(model.base_model).__name__, model.base_model.lorta_adapters["default"].count()
        ('LortaModel', 96)
    """

    uses_shared_state = True
    prefix = "lorta_"
    tuner_layer_cls = LortaLayer
    target_module_mapping: dict[str, list[str]] = {}

    # Onto the model

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.lorta_adapters = nn.ModuleDict()
        self._handles: dict[str, list[Handle]] = {}
        self._known = known_sites(model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        peft_config.target_modules = named_targets(
            self.model, self._known, peft_config.target_modules
        )
        return peft_config

    def _config(self, name: str) -> LortaConfig:
        return cast("LortaConfig", self.peft_config[name])

    def _adapters(self) -> dict[str, Adapter]:
        return cast("dict[str, Adapter]", dict(self.lorta_adapters.items()))

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the target modules and make the networks that they share, as `BaseTuner` asks.

        Raises:
            ValueError: lortalib cannot adapt a target. The model is then unchanged.
        """
        with ExitStack() as undo:
            undo.callback(self.peft_config.pop, adapter_name, None)
            self._targets: dict[str, LortaLayer] = {}
            undo.callback(Snapshot(self).restore)
            undo.callback(self._forget, adapter_name)
            known = [(p, p.requires_grad) for p in self.lorta_adapters.parameters()]
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            config = self._config(adapter_name)
            self._put(adapter_name, self._make(adapter_name, config, low_cpu_mem_usage), config)
            for parameter, flag in known:  # as PEFT does for the parameters of layers
                parameter.requires_grad_(flag)
            self._targets = {}
            undo.pop_all()

    def _forget(self, adapter_name: str) -> None:
        """Remove an adapter from the layers that were just targeted."""
        for layer in self._targets.values():
            layer.forget(adapter_name)

    def _create_and_replace(
        self,
        lorta_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, LortaLayer):
            self._targets[current_key] = target
            return
        if any(site.weight_read_directly for site in self._known if site.path == current_key):
            raise ValueError(
                f"{current_key}: the model reads its weight without calling it, so a wrapper around "
                "it would do nothing. Leave it out of target_modules, or use lortalib.nn.apply"
            )
        check_whole(self.model, {current_key: getattr(target, "weight", None)})
        layer = LortaLinear(target, **get_quantization_kwargs(self))
        if layer.in_features is None or isinstance(
            layer.get_base_layer(), (nn.MultiheadAttention, nn.Embedding, nn.modules.conv._ConvNd)
        ):
            raise ValueError(
                f"Target module {target} is not supported. Currently, only `torch.nn.Linear` (also "
                "quantized) and `transformers.pytorch_utils.Conv1D` are supported."
            )
        self._replace_module(parent, target_name, layer, target)
        self._targets[current_key] = layer

    def _make(self, name: str, config: LortaConfig, meta: bool) -> Adapter:
        """Make the adapter for the modules that were just targeted."""
        modules = {path: layer.get_base_layer() for path, layer in self._targets.items()}

        def device(site: Site) -> torch.device:
            paths = (site.path, *site.tied_paths)
            return next(self._targets[path].device for path in paths if path in self._targets)

        planned = plan_sites(
            sites_of(self._known, modules),
            config.decomposition,
            config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            init=config.start,
            gqa=config.gqa,
            acts_on=config.acts_on,
            device=torch.device("meta") if meta or config.ranks is not None else device,
        )
        if config.ranks is not None:  # add_weighted_adapter wrote them
            planned = with_ranks(planned, config.ranks, torch.device("meta") if meta else device)
        return make_adapter(name, planned)

    def _put(self, name: str, adapter: Adapter, config: LortaConfig) -> None:
        """Register an adapter and let the targeted modules add its updates."""
        adapter.active = True  # PEFT decides which of the installed adapters a layer adds
        self.lorta_adapters[name] = adapter.train(self.training)
        adapter.belong_to(PeftHost(self.model))
        config.description = describe_for_peft(adapter, self.model)
        handles = self._handles.setdefault(name, [])
        handles.extend(watch_forwards(self.model, adapter.scope, adapter.groups))
        for path, own in by_module(adapter.sites):
            if path in self._targets:
                tied = path != own[0].path and own[0].path in self._targets
                self._targets[path].add(name, adapter, own, tied)
        for source in adapter.sources:
            source.prepare()
        trains = name in self.active_adapters and not config.inference_mode
        for network in adapter.networks.values():
            assert isinstance(network, Network)
            for tensor, term in zip(network.stored, network.legs.terms):
                tensor.requires_grad_(trains and not term.frozen)

    # Off the model

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Replace a module by a layer, or a layer by its module; a layer has no parameters to move."""
        setattr(parent, child_name, new_module)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Add the updates of adapters to the weights, as `BaseTuner` describes.

        Raises:
            ValueError: a weight is computed, or shared with a module that the adapters do not change alike.
        """
        prepare_to_merge(self.model, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the base's weights bit for bit, as `BaseTuner` describes.

        Raises:
            ValueError: a weight is computed from other parameters since it was merged. Nothing is changed.
        """
        prepare_to_unmerge(self.model)
        super().unmerge_adapter()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, as `BaseTuner` describes."""
        super().delete_adapter(adapter_name)
        self._release(adapter_name)
        del self.lorta_adapters[adapter_name]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            prepare_to_merge(self.model, adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for name in self.lorta_adapters:
            self._release(name)
        return model

    def _release(self, name: str) -> None:
        """Remove the hooks of an adapter, which is then on no model."""
        detach(self._handles.pop(name, []))
        adapter = self._adapters()[name]
        adapter.scope.forget()
        adapter.belong_to(None)

    # Parameters

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Bring back parameters that accelerate offloads before values are loaded into them."""
        for adapter in self._adapters().values():
            adapter.bring_back()
        super()._load_from_state_dict(*args, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast half-precision factors to float32; without autocasting, cast factors to the base's dtype."""
        if adapter_name not in self.lorta_adapters:
            return
        networks = self._adapters()[adapter_name].networks
        if autocast_adapter_dtype:
            if next(networks.parameters()).dtype in (torch.float16, torch.bfloat16):
                networks.float()
            return
        weight = next(iter(weights_of(self.model).values()))
        if weight.dtype.is_floating_point:
            networks.to(weight.dtype)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Shorten ``lorta_adapters.<adapter>.networks`` to ``lorta_adapters.networks``, as files have it."""
        own = rf"(^|\.)lorta_adapters\.{re.escape(adapter_name)}\."
        return re.sub(own, r"\1lorta_adapters.", key, count=1)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Add an adapter whose update is exactly the weighted sum of the updates of other adapters.

        The ranks add up: the new networks are direct sums along the bonds.

        Args:
            adapters: names of adapters with the same decomposition and modules.
            weights: a factor for each adapter.
            adapter_name: name of the new adapter.
            combination_type: only ``"cat"``; LoRA's other types are approximations.

        Raises:
            ValueError: an adapter is unknown, decompositions or targets differ, the name is in use, or the
                combination type is another.
        """
        check_sum([*self.lorta_adapters], adapters, weights, adapter_name, combination_type)
        owners = [self._adapters()[name] for name in adapters]
        networks = weighted_sum(owners, weights)
        config = copy.copy(self._config(adapters[0]))
        describe_sum(config, owners, networks)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        try:
            own = self._adapters()[adapter_name]
            with torch.no_grad():
                for group in own.groups:
                    values = networks[group.name].stored
                    for tensor, value in zip(own.network(group).stored, values):
                        tensor.copy_(value)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise

    def export_lora(self, folder: str | PathLike[str], adapter_name: str = "default") -> Path:
        """Write ``adapter_name`` to ``folder`` as a standard LoRA; see `lortalib.nn.export_lora`.

        The file also contains the modules that are saved with the adapter (``modules_to_save``).

        Raises:
            KeyError: no adapter has this name.
            ValueError: the adapter trains rows of an embedding (``trainable_token_indices``).
        """
        if adapter_name not in self.lorta_adapters:
            raise KeyError(
                f"no adapter {adapter_name!r}; there is {', '.join(self.lorta_adapters)}"
            )
        trained, own = whole_modules(self.model, adapter_name), self._adapters()[adapter_name]
        return export_lora(own, folder, self.model, trained_modules=trained)

    # Batches whose rows differ

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass ``adapter_names`` (a name or "__base__" for each row) to the layers within a context."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = {name for name in names if name != BASE and name not in self.lorta_adapters}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
            )
        with named_rows(self, names, repeats_of(self.model, args, kwargs)):
            yield
