"""Refuses a forward that a checkpoint runs again on modules which compute something else since.

An adapter that is merged, or gone, has no hooks. So a change that it makes to modules is seen by a hook
that stands on these modules for as long as a checkpoint is alive whose forward came before the change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from .._torch import is_in_backward, is_tracing, remove_pre_hook, running_checkpoints


def _always(checkpoint: object) -> bool:
    return True


def never(checkpoint: object) -> bool:
    """Return False for every checkpoint: what its forward had is gone."""
    return False


class StatesOfForwards:
    """The state of a model in the forwards of checkpoints that came before a change. A copy of a model has no
    graph, so a copy of this is empty."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, object] = WeakKeyDictionary()

    def note(self, checkpoints: Iterable[object], state: object) -> None:
        """Note the state before a change for checkpoints of which none is known.

        Args:
            checkpoints: all that are alive.
            state: the state.
        """
        for each in checkpoints:
            self._known.setdefault(each, state)

    def of(self, checkpoint: object) -> object:
        """Return the state in which a checkpoint's forward ran."""
        return self._known[checkpoint]

    def __reduce__(self) -> Any:
        return StatesOfForwards, ()


class RecomputeGuard:
    """A forward pre-hook that refuses the forwards of some checkpoints, while the modules are changed.

    It leaves a module, and those in it, at the first forward after the last of the checkpoints is gone. A
    copy of a model has no graph, so a copy of the hook leaves at once.

    Args:
        checkpoints: the checkpoints whose forwards came before the change.
        is_as_before: returns True if the modules compute the same as in the forward of a checkpoint.
    """

    def __init__(
        self,
        checkpoints: Iterable[object] = (),
        is_as_before: Callable[[object], bool] = _always,
    ) -> None:
        self._checkpoints: WeakSet[Any] = WeakSet(checkpoints)
        self._is_as_before = is_as_before

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Refuse the forward under way if it must not run again, as torch calls a forward pre-hook.

        Raises:
            RuntimeError: the forward is run again by one of the checkpoints.
        """
        if is_tracing():
            return
        if not self._checkpoints:
            for each in module.modules():
                remove_pre_hook(each, self)
        elif is_in_backward() and any(
            each in self._checkpoints and not self._is_as_before(each)
            for each in running_checkpoints()
        ):
            raise RuntimeError(
                "an adapter was merged, unmerged, switched or removed, or a bank removed, after the forward "
                "that a checkpoint runs again now, and the model no longer computes what it did then; call "
                "backward() before such a change, or run the forward anew"
            )

    def __reduce__(self) -> Any:
        return RecomputeGuard, ()


def guard(
    model: nn.Module,
    changed: Iterable[nn.Module],
    checkpoints: Iterable[object],
    is_as_before: Callable[[object], bool],
) -> None:
    """Put a guard on every module that contains, or shares a parameter with, one of the changed modules.

    Args:
        model: the model.
        changed: the modules that compute something else after the change.
        checkpoints: as for `RecomputeGuard`; without any, nothing is done.
        is_as_before: as for `RecomputeGuard`.
    """
    hook = RecomputeGuard(checkpoints := list(checkpoints), is_as_before)
    if not checkpoints:
        return
    own = {id(each) for module in changed for each in (module, *module.parameters())}
    for module in model.modules():
        if any(id(each) in own for each in (*module.modules(), *module.parameters())):
            module.register_forward_pre_hook(hook)
