"""Keeps track of what the adapters of a model have changed in its weights, and of what others have."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._torch import live_checkpoints
from ._adapter import Adapter
from ._adapter_dict import AdapterDict
from ._base_record import BaseRecord
from ._forward import Handle
from ._recompute_guard import StatesOfForwards, guard


class WeightChanges(AdapterDict):
    """The adapters of one model, and the state of the weights that they change.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = model.training
        self._model = [model]  # in a list, so that it is not registered as a submodule
        self._record = BaseRecord(model)
        self._states = StatesOfForwards()
        # Snapshots of the merged adapters, as they were merged.
        self._merged_copies: dict[str, Adapter] = {}
        self._handles: dict[str, list[Handle]] = {}
        self._kept = 0  # adapters that were left in the weights for good

    def __getstate__(self) -> dict[str, Any]:
        noticed = self._record.noticed(self.model, self._in_files())
        return {**super().__getstate__(), "_record": BaseRecord(None, noticed)}

    @property
    def model(self) -> nn.Module:
        """The model that carries the adapters."""
        return self._model[0]

    def _in_order(self, copies: dict[str, Adapter]) -> list[Adapter]:
        """Return the snapshots of merged adapters, in the order in which the adapters were applied."""
        return [copies[other.name] for other in self.adapters() if other.name in copies]

    @contextmanager
    def _changing(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Change the weights of modules within this context. Checkpoints whose forwards came before do not
        repeat them behind the change, and the record of the base does not count it.

        Args:
            modules: the modules; none if nothing but hooks is switched.
        """
        modules = list(modules)
        if not modules:  # to switch an adapter costs nothing
            yield
            return
        checkpoints = live_checkpoints()
        self._states.note(checkpoints, self._weights_state())
        guard(self.model, modules, checkpoints, self._is_as_in)
        with self._record.own_writes(self.model, self._in_files()):
            yield

    def _is_as_in(self, checkpoint: object) -> bool:
        return self._states.of(checkpoint) == self._weights_state()

    def _leave_in(self, modules: Iterable[nn.Module]) -> None:
        """Note that modules have the values of an adapter for good.

        Args:
            modules: modules of the model.
        """
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        self._record.add(self.model, tensors)
        vars(self)["_kept"] += 1

    def changed_base(self) -> list[str]:
        """List the tensors of the base that have changed since its first adapter was applied, whose values no
        file of an adapter contains."""
        return self._record.changed(self.model, self._in_files())

    def _weights_state(self) -> object:
        """Return a value that is equal while the same updates are merged, the same modules trained, and the
        same hooks there: run again, hooks in another order save their tensors for each other."""
        trained = [each for each in self.adapters() if each.active and each.trained_modules.paths]
        held = [*self._in_order(self._merged_copies), *trained]
        first = [handle for handles in self._handles.values() for handle in handles[:1]]
        hooks = [handle.id for handle in first if isinstance(handle, RemovableHandle)]
        return self._kept, tuple(map(weakref.ref, held)), hooks

    def _in_files(self) -> list[Tensor]:
        """List the tensors of the modules that have the values of an adapter."""
        trained = [a.trained_modules.modules(self.model) for a in self.adapters() if a.active]
        return [t for each in trained for m in each for t in (*m.parameters(), *m.buffers())]
