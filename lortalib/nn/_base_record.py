"""Notices what has changed in a model since adapters were put on it, which no adapter file contains."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._stacklevel import outside
from .._torch import saved_buffers
from ._anatomy import ATTRIBUTE, plain_name
from ._host_interface import Host
from ._sharded import is_zero_parameter

#: Whether the model is written too, beside the adapter that is being saved.
_BASE_IS_WRITTEN = ContextVar("_BASE_IS_WRITTEN", default=False)


class _Known(NamedTuple):
    """What is known of a tensor: its shape and its module, and its numbers while it is the same object.

    Attributes:
        shape: its shape.
        module: its module.
        tensor: its id, since a weak reference would forbid torch to swap tensors; None if writes are not
            counted.
        version: torch's count of the writes to it.
        lines: some of its numbers. Others write the same numbers again, as DDP and ``load_state_dict`` do.
    """

    shape: tuple[int, ...]
    module: weakref.ref[nn.Module]
    tensor: int | None = None
    version: int = 0
    lines: tuple[Tensor, ...] = ()


class BaseRecord:
    """The parameters and saved buffers of a model, as they were before the first adapter.

    A change of a shape, a new tensor or module and a write in place are noticed, except writes through
    ``p.data``, to tensors that other tools have replaced or divided, and of few numbers amid a matrix.
    Tensors that were removed are not mentioned.

    Args:
        model: the model; None to begin when `changed` is called next, as for a copy that is not complete yet.
        changed: names of the tensors that have changed already.
    """

    def __init__(self, model: nn.Module | None, changed: Iterable[str] = ()) -> None:
        self._changed = dict.fromkeys(changed)  # first, so that an interrupt forgets no change
        self._known = None if model is None else _look_at_all(model)

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
            elif known is None or _differs(known, module, tensor):
                found[name] = None
        return list(found)

    def noticed(self, model: nn.Module, leave_out: Iterable[Tensor] = ()) -> list[str]:
        """List the names that `changed` lists, and of the tensors left out those that had changed before an
        adapter trained them: they have these values again when it is gone.

        Args:
            model: the model.
            leave_out: as for `changed`.
        """
        return list(dict.fromkeys([*self._changed, *self.changed(model, leave_out)]))

    @contextmanager
    def own_writes(self, model: nn.Module, leave_out: Iterable[Tensor] = ()) -> Iterator[None]:
        """Do not count what is written to the model within this context.

        Args:
            model: the model.
            leave_out: as for `changed`.
        """
        changed = self.noticed(model, leave_out)
        try:
            yield
        finally:
            self.__init__(model, changed)  # type: ignore[misc]

    def add(self, model: nn.Module, tensors: Iterable[Tensor]) -> None:
        """Count tensors as changed: an adapter stays in them for good."""
        own = {id(tensor) for tensor in tensors}
        self._changed |= {name: None for name, _, tensor in _tensors(model) if id(tensor) in own}


def warn_of_changes(host: Host) -> None:
    """Warn that a file of an adapter does not contain changes of its base, unless the base is written too.

    Args:
        host: the host of the adapter.
    """
    names = host.changed_base()
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
    # Inference tensors count no writes; other tools write to their own kinds of tensors.
    counts = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()
    if is_zero_parameter(tensor) or tensor.is_meta or not counts:
        return _Known(_shape(tensor), weakref.ref(module))
    lines = tuple(line.clone() for line in _lines(tensor.detach()))
    return _Known(_shape(tensor), weakref.ref(module), id(tensor), tensor._version, lines)


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.ds_shape if is_zero_parameter(tensor) else tensor.shape)


def _lines(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the lines along each axis through the first entry and through the middle; a new row or column, or
    a training step, changes one of them."""
    for middle in (False, True) if tensor.numel() else ():
        place = [size // 2 if middle else 0 for size in tensor.shape]
        for axis in range(max(tensor.dim(), 1)):
            at: list[Any] = [*place]
            at[axis : axis + 1] = [slice(None)] * (tensor.dim() > 0)
            yield tensor[tuple(at)]


def _differs(known: _Known, module: nn.Module, tensor: Any) -> bool:
    if _shape(tensor) != known.shape or module is not known.module():
        return True
    if id(tensor) != known.tensor or tensor._version == known.version:
        return False
    return not all(map(_equal, known.lines, _lines(tensor.detach())))


def _equal(known: Tensor, now: Tensor) -> bool:
    """Compare every bit of numbers, which the model may have moved or cast since."""
    one, other = (t.to(now.device, now.dtype).reshape(-1).contiguous() for t in (known, now))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
