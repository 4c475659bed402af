"""What an adapter was in a forward that a checkpoint runs again within the backward.

A checkpoint keeps the arguments of a function in place of what it computed, and runs it again in the
backward. If adapters were switched in between, it has to run with those of the forward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils import checkpoint

from .._torch import has_saved_tensor_hooks, is_in_backward
from ._forward import ForwardScope

#: The functions of torch's checkpoints that stand on the stack while a checkpointed function runs, in the
#: forward and in the backward, each with what the two have in common: for the reentrant kind the node, for
#: the other the record of the checkpoint.
_STACK = {
    "forward": lambda values: values.get("ctx"),
    "backward": lambda values: values.get("ctx"),
    "checkpoint": lambda values: _suspended(values.get("gen")).get("new_frame"),
    "unpack_hook": lambda values: values.get("frame"),
}


#: What `Remembered` has of a checkpoint in which it did not see the adapter.
_UNKNOWN = object()


def _suspended(generator: Any) -> dict[str, Any]:
    frame: FrameType | None = getattr(generator, "gi_frame", None)
    return {} if frame is None else frame.f_locals


def checkpoints() -> Iterator[object]:
    """The checkpoints that are being run, innermost first: equal objects in a forward and where it is run
    again."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == checkpoint.__file__ and code.co_name in _STACK:
            found = _STACK[code.co_name](frame.f_locals)
            if found is not None:
                yield found
        frame = frame.f_back


class AdapterScope(ForwardScope):
    """The forwards of the modules that one adapter updates.

    Attributes:
        adapter: whose; set by itself.
    """

    adapter: Any

    def begin(self, module: Any, frame: FrameType) -> None:
        """The forward of a module around projections begins; see `ForwardScope`."""
        before = self.running
        super().begin(module, frame)
        if self.running is not before:
            # A reentrant checkpoint of the whole model runs it without gradients.
            self._local.with_gradients = torch.is_grad_enabled() or any(checkpoints())
            self.adapter.bring_back()

    def may_be_checkpointed(self) -> bool:
        """Whether the forward under way could be within a checkpoint. That costs nothing where it is not."""
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
    """Whether an adapter added its update in the forwards that checkpoints may run again."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, bool | None] = WeakKeyDictionary()

    def record(self, now: bool) -> None:
        """Remember it for every checkpoint that is being run."""
        for each in checkpoints():
            if self._known.setdefault(each, now) is not now:
                self._known[each] = None  # it was switched inside, and will be again

    def recall(self, now: bool, merged: bool, name: str) -> bool:
        """Whether it was added in the forward that is run again; what it is now where none is.

        Args:
            now: whether it is added now.
            merged: whether it stands in the weights now.
            name: of the adapter.

        Raises:
            RuntimeError: it stands in the weights now and did not then, or the other way round, or it was
                not on the model.
        """
        running = list(checkpoints())
        known = next((self._known[each] for each in running if each in self._known), _UNKNOWN)
        if (merged and known is not _UNKNOWN) or (running and now and known is _UNKNOWN):
            raise RuntimeError(
                f"adapter {name!r} was merged, unmerged or applied after the forward that a checkpoint "
                "runs again now; call backward() before such a change, or run the forward again"
            )
        return now if known is _UNKNOWN or known is None else bool(known)

    def __len__(self) -> int:
        """For how many checkpoints."""
        return len(self._known)

    def __reduce__(self) -> Any:
        return Remembered, ()


def added_in_forward(adapter: Any) -> bool:
    """Whether the forward under way adds an adapter's update; it may be one that is run again.

    Args:
        adapter: the adapter.

    Raises:
        RuntimeError: the forward cannot be run again, since it was with other values of the modules that
            the adapter trains, or with other weights.
    """
    remembered: Remembered = adapter.remembered
    merged: bool = adapter.merged
    now: bool = adapter.active and not merged
    if not is_in_backward():
        if not merged and adapter.scope.may_be_checkpointed():
            remembered.record(now)
        return now
    then = remembered.recall(now, merged, adapter.name)
    if then is not now and adapter.trained_modules.paths:
        raise RuntimeError(
            f"adapter {adapter.name!r} was switched between a forward and its backward, and a checkpoint "
            "runs that forward again, but the modules that train with the adapter "
            f"({', '.join(adapter.trained_modules.paths)}) have other values now; call backward() before "
            "switching"
        )
    return then
