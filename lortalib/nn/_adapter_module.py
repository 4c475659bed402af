"""Defines the part of an adapter that torch and training engines save, load, copy, move and run again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..decomp import Network
from ._forward import PairSource
from ._host_interface import Host
from ._offloaded import bring_back
from ._recompute import AdapterScope, Remembered, added_in_forward
from ._shared_parameters import find_aliases, leave_out, put_back, share_again
from ._trained_modules import TrainedModules


class AdapterModule(nn.Module):
    """The networks of an adapter, and the state of the adapter that a forward reads.

    Attributes:
        networks: the networks by name of the group; they own every trainable parameter once.
        active: whether the adapter takes part in the model's forward.
        merged: whether the update is merged into the weights.
        scope: the forward under way.
        remembered: whether the adapter took part in forwards that checkpoints may run again.
        trained_modules: whole modules that train with the adapter.
    """

    name: str

    def __init__(
        self,
        networks: Mapping[str, Network],
        sources: list[PairSource],
        trained_modules: TrainedModules,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.trained_modules = trained_modules
        self.remembered = Remembered()
        self.active = False
        self.merged = False
        scope = AdapterScope(sources)
        scope.adapter = self
        self.scope = scope
        self._aliases = find_aliases(self.networks)
        self._host: list[Host] = []  # in a list, so that it is not registered as a submodule

    def require_host(self) -> Host:
        """Return the host that carries the adapter.

        Raises:
            RuntimeError: the adapter was removed from its model.
        """
        if not self._host:
            raise RuntimeError(
                f"adapter {self.name!r} was removed from its model, or is a copy on no model; apply or load "
                "it again"
            )
        return self._host[0]

    @property
    def adds_update(self) -> bool:
        """True if the forward under way adds the update. If a checkpoint runs a forward again in a backward,
        the answer is that of the first run."""
        if torch.compiler.is_compiling():
            return self.active and not self.merged
        return added_in_forward(self)

    def keep_pairs(self) -> AbstractContextManager[None]:
        """Reuse the low-rank pairs of the forward before within a context, without comparing parameters.

        Otherwise each forward on a CPU compares the values once, and each forward on a GPU, where a
        comparison would wait for the device, makes its low-rank pairs again. This context saves both when
        decoding, where every token is a forward. It notices every change of the parameters except writes
        through ``p.data`` and by some fused optimisers.

        Example:
            >>> import lortalib, torch
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
            ...                              num_attention_heads=4, intermediate_size=64)).eval()
            >>> adapter = lortalib.nn.apply(model, "cp", rank=2)
            >>> with adapter.keep_pairs(), torch.no_grad():
            ...     outputs = [model(torch.tensor([[k]])) for k in range(3)]
        """
        return self.scope.keep()

    def bring_back(self) -> None:
        """Bring trainable parameters that accelerate offloaded back to the device that computes with them:
        the networks, and with gradients also the modules that train with the adapter.

        Raises:
            ValueError: a module that trains with the adapter shares a weight that is offloaded.
        """
        for name, network in self.networks.items():
            own = [alias for alias in self._aliases if alias.startswith(f"{name}.")]
            bring_back(network, {alias.removeprefix(f"{name}.") for alias in own})
        share_again(self.networks, self._aliases)
        if torch.is_grad_enabled() and self._host:
            self._host[0].bring_back(self)

    # State dicts, which contain a parameter of several networks once

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return torch's state dict; it contains a parameter that several networks share once."""
        with torch.no_grad():
            self.bring_back()
        state = super().state_dict(*args, **kwargs)
        leave_out(self._aliases, state, f"{kwargs.get('prefix', '')}networks.")
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        put_back(self._aliases, state_dict, f"{prefix}networks.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle keeps: the adapter on no model, with the values of the modules that train with
        it. The pickle of a model keeps the rest in the model's host, which takes the adapter back."""
        if not self._host:
            return self.__dict__
        values = self.trained_modules.values(self._host[0].model, copy=False)
        trained = TrainedModules(self.trained_modules.paths, values)
        return {**self.__dict__, "_host": [], "trained_modules": trained}

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterModule:
        """Copy the adapter: onto the copy of its model if that is being copied too, else onto no model."""
        copied = type(self).__new__(type(self))
        memo_is_empty = not memo
        memo[id(self)] = copied
        state = dict(self.__dict__)
        if not any(id(host) in memo or id(host.model) in memo for host in self._host):
            values = self.trained_modules.values(self._host[0].model if self._host else None)
            state |= {
                "_host": [],
                "trained_modules": TrainedModules(self.trained_modules.paths, values),
            }
            if memo_is_empty:  # not reached from a module that it updates
                state |= {"active": False, "merged": False}
        copied.__dict__.update(copy.deepcopy(state, memo))
        return copied
