"""Remembers which adapters a forward used, for checkpoints that run the forward again in the backward.

A checkpoint keeps the arguments of a function instead of its results, and runs the function again in the
backward. If adapters were switched in between, the second run must use the adapters of the first.
"""

from __future__ import annotations

from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from .._torch import has_saved_tensor_hooks, is_in_backward, running_checkpoints
from ._forward import ForwardScope

#: Stands in `Remembered` for a checkpoint whose first run did not ask.
_UNKNOWN: Any = object()

#: Stands in `Remembered` for a checkpoint whose function itself switches, and so does so again.
_SEVERAL: Any = object()


class CheckpointScope(ForwardScope):
    """Tracks forwards, and whether they could be within a checkpoint."""

    def begin(self, module: Any, frame: FrameType) -> None:
        """Begin the forward of a module around projections, as `ForwardScope.begin` describes."""
        before = self.running
        super().begin(module, frame)
        if self.running is not before:
            # A reentrant checkpoint of the whole model runs it without gradients.
            self._local.with_gradients = torch.is_grad_enabled() or any(running_checkpoints())

    def may_be_checkpointed(self) -> bool:
        """Return True if the forward under way could be within a checkpoint; the test is cheap."""
        if torch.is_grad_enabled():
            return has_saved_tensor_hooks()
        # A reentrant checkpoint runs its function without gradients, in a forward with gradients.
        local = self._local
        inside = getattr(local, "with_gradients", True) or self.running is None
        return inside and not torch.is_inference_mode_enabled()


class AdapterScope(CheckpointScope):
    """Tracks the forwards of the modules that one adapter updates.

    Attributes:
        adapter: the adapter, which sets this attribute.
    """

    adapter: Any

    def begin(self, module: Any, frame: FrameType) -> None:
        """Begin the forward of a module around projections, as `ForwardScope.begin` describes."""
        before = self.running
        super().begin(module, frame)
        if self.running is not before:
            self.adapter.bring_back()
            if self.adapter.active and not self.adapter.merged:
                if self.adapter.is_on_model:
                    self.watch(self.adapter.require_host().places(self.adapter))
                self.check_places()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "adapter": self.adapter}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.adapter = state["adapter"]


class Remembered:
    """Remembers what an adapter, or a bank, added in the forwards that checkpoints may run again."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._repeated: WeakSet[Any] = WeakSet()

    def record(self, now: Any) -> None:
        """Remember for every running checkpoint what is added.

        Args:
            now: stands for what is added now; false if that is nothing.
        """
        for each in running_checkpoints():
            if self._known.setdefault(each, now) is not now:
                self._known[each] = _SEVERAL

    def recall(self, now: Any, name: str) -> Any:
        """Return what was added in the forward that runs again; ``now`` if none runs again.

        Args:
            now: stands for what is added now; false if that is nothing.
            name: says what adds it, for the error message.

        Raises:
            RuntimeError: something is added now that was not on the model in that forward.
        """
        running = list(running_checkpoints())
        self._repeated.update(running)
        found = next((self._known[each] for each in running if each in self._known), _UNKNOWN)
        if found is _UNKNOWN and running and now:
            raise RuntimeError(
                f"{name} was put on the model after the forward that a checkpoint runs again now; call "
                "backward() before such a change, or run the forward anew"
            )
        return now if found is _UNKNOWN or found is _SEVERAL else found

    def __len__(self) -> int:
        """Return the number of remembered checkpoints."""
        return len(self._known)

    def added(self) -> list[Any]:
        """List the remembered checkpoints in which something was added."""
        return [each for each, known in self._known.items() if known]

    @property
    def is_waiting(self) -> bool:
        """True if something was added in a remembered checkpoint that has not run again yet."""
        return any(each not in self._repeated for each in self.added())

    def __reduce__(self) -> Any:
        return Remembered, ()


def added_in_forward(adapter: Any) -> bool:
    """Return True if the forward under way, which a checkpoint may run again, adds an adapter's update.

    Args:
        adapter: the adapter.

    Raises:
        RuntimeError: the adapter was put on the model after the forward that runs again.
    """
    remembered: Remembered = adapter.remembered
    now: bool = adapter.active and not adapter.merged
    if is_in_backward():
        return bool(remembered.recall(now, f"adapter {adapter.name!r}"))
    if adapter.scope.may_be_checkpointed():
        remembered.record(now)
    return now
