"""Notices what has changed in a model since adapters were put on it, which no adapter file contains."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._stacklevel import outside
from .._torch import saved_buffers
from ._anatomy import ATTRIBUTE, plain_name
from ._sharded import is_zero_parameter

#: Whether the model is written too, beside the adapter that is being saved.
_BASE_IS_WRITTEN = ContextVar("_BASE_IS_WRITTEN", default=False)


class _Known(NamedTuple):
    """What is known of a tensor: its shape and its module, and its version while it is the same object."""

    shape: tuple[int, ...]
    module: weakref.ref[nn.Module]
    tensor: int | None  # its id: a weak reference would forbid torch to swap tensors
    version: int


class BaseRecord:
    """The parameters and saved buffers of a model, as they were before the first adapter.

    Every change of a shape, a new tensor or module and every write in place is noticed, except writes through
    ``p.data`` and to tensors that other tools have replaced or divided. Tensors that were removed are not
    mentioned.

    Args:
        model: the model; None to begin when `changed` is called next, as for a copy that is not complete yet.
        changed: names of the tensors that have changed already.
    """

    def __init__(self, model: nn.Module | None, changed: Iterable[str] = ()) -> None:
        self._known = None if model is None else _look_at_all(model)
        self._changed = dict.fromkeys(changed)

    def changed(self, model: nn.Module, leave_out: Iterable[Tensor] = ()) -> list[str]:
        """List the names of the tensors that have changed.

        Args:
            model: the model.
            leave_out: tensors that adapters train and save.
        """
        own = {id(tensor) for tensor in leave_out}
        found = dict(self._changed)
        self._known = self._known or _look_at_all(model)
        for name, module, tensor in _tensors(model):
            known = self._known.get(name)
            if id(tensor) in own:
                found.pop(name, None)
            elif known is None or _differs(known, _look(module, tensor)):
                found[name] = None
        return list(found)

    @contextmanager
    def own_writes(self, model: nn.Module, leave_out: Iterable[Tensor] = ()) -> Iterator[None]:
        """Do not count what is written to the model within this context.

        Args:
            model: the model.
            leave_out: as for `changed`.
        """
        changed = self.changed(model, leave_out)
        try:
            yield
        finally:
            self.__init__(model, changed)  # type: ignore[misc]

    def add(self, model: nn.Module, tensors: Iterable[Tensor]) -> None:
        """Count tensors as changed: an adapter stays in them for good."""
        own = {id(tensor) for tensor in tensors}
        self._changed |= {name: None for name, _, tensor in _tensors(model) if id(tensor) in own}


def warn_of_changes(names: list[str]) -> None:
    """Warn that a file of an adapter does not contain changes of its base, unless the base is written too.

    Args:
        names: names of changed tensors.
    """
    if names and not _BASE_IS_WRITTEN.get():
        more = f" and {len(names) - 3} more" * (len(names) > 3)
        warnings.warn(
            f"the model has changed since the adapter was put on it, in {', '.join(names[:3])}{more}, which "
            "no file of the adapter contains; model.save_pretrained(folder) writes the model beside it",
            stacklevel=outside(),
        )


@contextmanager
def base_is_written() -> Iterator[None]:
    """Let `warn_of_changes` know within a context that the model is written too."""
    token = _BASE_IS_WRITTEN.set(True)
    try:
        yield
    finally:
        _BASE_IS_WRITTEN.reset(token)


def _tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield each floating-point parameter and each saved buffer: its name in the plain model, its module and
    the tensor itself."""
    for path, module in model.named_modules():
        if ATTRIBUTE in path.split("."):
            continue
        numbers = {k: t for k, t in module.named_parameters(recurse=False) if t.is_floating_point()}
        for name, tensor in {**numbers, **saved_buffers(module)}.items():
            yield plain_name(f"{path}.{name}" if path else name), module, tensor


def _look_at_all(model: nn.Module) -> dict[str, _Known]:
    return {name: _look(module, tensor) for name, module, tensor in _tensors(model)}


def _look(module: nn.Module, tensor: Any) -> _Known:
    shape = tuple(tensor.ds_shape if is_zero_parameter(tensor) else tensor.shape)
    # Inference tensors count no writes; other tools write to their own kinds of tensors.
    counts = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()
    if is_zero_parameter(tensor) or not counts:
        return _Known(shape, weakref.ref(module), None, 0)
    return _Known(shape, weakref.ref(module), id(tensor), tensor._version)


def _differs(known: _Known, now: _Known) -> bool:
    if now.shape != known.shape or now.module() is not known.module():
        return True
    return None is not now.tensor == known.tensor and now.version != known.version
