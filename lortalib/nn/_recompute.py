"""Remembers which adapters a forward used, for checkpoints that run the forward again in the backward.

A checkpoint keeps the arguments of a function instead of its results, and runs the function again in the
backward. If adapters were switched in between, the second run must use the adapters of the first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.utils import checkpoint

from .._torch import has_saved_tensor_hooks, is_in_backward
from ._forward import ForwardScope

#: Functions of torch.utils.checkpoint that are on the call stack while a checkpointed function runs, in the
#: forward or again in the backward. Each maps its local variables to an object that both runs share: the
#: autograd node of a reentrant checkpoint, the record of the checkpoint otherwise.
_STACK = {
    "forward": lambda values: values.get("ctx"),
    "backward": lambda values: values.get("ctx"),
    "checkpoint": lambda values: _suspended(values.get("gen")).get("new_frame"),
    "unpack_hook": lambda values: values.get("frame"),
}


#: Stands in `Remembered.recall` for a checkpoint whose first run did not see the adapter.
_UNKNOWN: Any = object()


def _suspended(generator: Any) -> dict[str, Any]:
    frame: FrameType | None = getattr(generator, "gi_frame", None)
    return {} if frame is None else frame.f_locals


def checkpoints() -> Iterator[object]:
    """Yield an object for each checkpoint that is running, innermost first. A checkpoint has the same object
    in the forward and in the run that repeats it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == checkpoint.__file__ and code.co_name in _STACK:
            found = _STACK[code.co_name](frame.f_locals)
            if found is not None:
                yield found
        frame = frame.f_back


class AdapterScope(ForwardScope):
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
            # A reentrant checkpoint of the whole model runs it without gradients.
            self._local.with_gradients = torch.is_grad_enabled() or any(checkpoints())
            self.adapter.bring_back()

    def may_be_checkpointed(self) -> bool:
        """Return True if the forward under way could be within a checkpoint; the test is cheap."""
        if torch.is_grad_enabled():
            return has_saved_tensor_hooks()
        # A reentrant checkpoint runs its function without gradients, in a forward with gradients.
        local = self._local
        inside = getattr(local, "with_gradients", True) or self.running is None
        return inside and not torch.is_inference_mode_enabled()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "adapter": self.adapter}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.adapter = state["adapter"]


class Remembered:
    """Remembers if an adapter added its update in the forwards that checkpoints may run again."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, tuple[bool, object] | None] = WeakKeyDictionary()
        self._repeated: WeakSet[Any] = WeakSet()
        self.was_merged = False  # while it is merged, forwards may run without its hooks

    def record(self, now: bool, weights: object) -> None:
        """Remember for every running checkpoint whether the adapter adds its update, and to which weights.

        Args:
            now: whether the update is added now.
            weights: stands for what is merged into the weights; equal values stand for equal weights.
        """
        for each in checkpoints():
            if self._known.setdefault(each, (now, weights)) != (now, weights):
                self._known[each] = None  # the function itself switches or merges adapters

    def recall(self, now: bool, weights: object, name: str) -> bool:
        """Return whether the update was added in the forward that runs again; ``now`` if none runs again.

        Args:
            now: whether the update is added now.
            weights: as for `record`.
            name: name of the adapter.

        Raises:
            RuntimeError: an adapter was merged, unmerged, applied or removed since that forward.
        """
        running = list(checkpoints())
        self._repeated.update(running)
        known = next((self._known[each] for each in running if each in self._known), _UNKNOWN)
        if known is None or not running:
            return now
        if (now or self.was_merged) if known is _UNKNOWN else known[1] != weights:
            raise RuntimeError(
                f"adapter {name!r} or another was merged, unmerged, applied or removed after the forward "
                "that a checkpoint runs again now; call backward() before such a change, or run it anew"
            )
        return now if known is _UNKNOWN else bool(known[0])

    def __len__(self) -> int:
        """Return the number of remembered checkpoints."""
        return len(self._known)

    @property
    def is_waiting(self) -> bool:
        """True if a remembered checkpoint added the update and has not run again yet."""
        return any(
            (known is None or known[0]) and each not in self._repeated
            for each, known in self._known.items()
        )

    def __reduce__(self) -> Any:
        return Remembered, ()


def added_in_forward(adapter: Any) -> bool:
    """Return True if the forward under way, which a checkpoint may run again, adds an adapter's update.

    Args:
        adapter: the adapter.

    Raises:
        RuntimeError: the forward cannot run again, because the weights, or the modules that train with the
            adapter, have other values now.
    """
    remembered: Remembered = adapter.remembered
    now: bool = adapter.active and not adapter.merged
    if not is_in_backward():
        if adapter.scope.may_be_checkpointed():
            remembered.record(now, adapter.weights_state)
        return now
    then = remembered.recall(now, adapter.weights_state, adapter.name)
    if then is not now and adapter.trained_modules.paths:
        raise RuntimeError(
            f"adapter {adapter.name!r} was switched between a forward and its backward, and a checkpoint "
            "runs that forward again, but the modules that train with the adapter "
            f"({', '.join(adapter.trained_modules.paths)}) have other values now; call backward() before "
            "switching"
        )
    return then
