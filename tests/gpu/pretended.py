"""A pretended accelerator: tensors that say they lie on another device, and compute on the CPU.

It is as strict as a GPU is: an operation on tensors of two devices is refused, and what would make Python
wait for a GPU can be forbidden (`no_waiting`). It belongs to a process of its own, since torch keeps one
such device for the whole process.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import _pytree as tree
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class Backend(_DummyBackendModule):
    """What torch asks of the module of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None) -> None:
        torch.set_rng_state(state)


NAME = "pretended"
_setup_privateuseone_for_python_backend(NAME, Backend())
DEVICE = torch.device(NAME, 0)
CPU = torch.device("cpu")
aten = torch.ops.aten

#: Operations whose result depends on numbers that Python has to see.
READING = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
}


class Waits(Exception):
    """Python would wait for the device."""


class State:
    """What is allowed now."""

    waiting_allowed = True


class FarTensor(torch.Tensor):
    """A tensor on the pretended device.

    Attributes:
        near: the same tensor on the CPU; views share its memory.
    """

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor, requires_grad: bool = False) -> "FarTensor":
        near = _near(near)
        return torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )

    def __init__(self, near: torch.Tensor, requires_grad: bool = False) -> None:
        self.near = _near(near)

    def __repr__(self) -> str:
        return f"FarTensor({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, *args, **(kwargs or {}))


def dispatch(func, *args, **kwargs):
    """Run an operation on the CPU; its results lie where a device would have them."""
    flat, spec = tree.tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    far = [t for t in tensors if isinstance(t, FarTensor)]
    wanted = [value for value in flat if isinstance(value, torch.device)]
    kind = func.overloadpacket
    moves = kind in (aten._to_copy, aten.copy_, aten._copy_from)
    if not far and not any(device.type == NAME for device in wanted):
        return func(*args, **kwargs)
    target = wanted[0].type == NAME if wanted else bool(far)
    if (far and kind in READING) or _indexes_by_bool(kind, args):
        _wait(func)
    if moves and (any(not isinstance(t, FarTensor) for t in tensors) or not target):
        _wait(func)
    elif not moves:
        # A number by itself may lie on the CPU, as on a GPU.
        others = [t for t in tensors if not isinstance(t, FarTensor) and t.dim()]
        if far and others:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    near = [_near(value) for value in flat]
    args, kwargs = tree.tree_unflatten(near, spec)
    result = func(*args, **kwargs)
    known = {id(n): value for n, value in zip(near, flat) if isinstance(value, FarTensor)}

    def out(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        return FarTensor(value) if target else value

    return tree.tree_map(out, result)


def _near(value):
    if isinstance(value, FarTensor):
        return value.near
    if isinstance(value, torch.device):
        return CPU
    return value


def _indexes_by_bool(kind, args) -> bool:
    if kind not in (aten.index, aten.index_put, aten.index_put_):
        return False
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])


def _wait(func) -> None:
    if not State.waiting_allowed:
        raise Waits(f"{func} waits for the device")


# What reaches the device without a tensor that lies there, such as ``torch.zeros(2, device=DEVICE)``.


@torch.library.impl("aten::empty.memory_format", "privateuseone")
def empty(size, *, dtype=None, **options):
    return FarTensor(torch.empty(size, dtype=dtype))


@torch.library.impl("aten::empty_strided", "privateuseone")
def empty_strided(size, stride, *, dtype=None, **options):
    return FarTensor(torch.empty_strided(size, stride, dtype=dtype))


def made_near(func):
    """A function that makes its tensor on the CPU: torch would resize an empty one."""

    def make(*args, device=None, pin_memory=None, **kwargs):
        return FarTensor(func(*args, **kwargs))

    return make


for name in ("eye", "eye.m", "arange", "arange.start", "arange.start_step", "randperm"):
    kind, _, overload = name.partition(".")
    factory = made_near(getattr(getattr(aten, kind), overload or "default"))
    torch.library.impl(f"aten::{name}", "privateuseone")(factory)


@torch.library.impl("aten::_copy_from", "privateuseone")
def copy_from(source, target, non_blocking=False):
    if source.numel():
        _wait("a copy between devices")
    _near(target).copy_(_near(source))
    return target


@contextmanager
def no_waiting() -> Iterator[None]:
    """Forbid what would wait for a GPU."""
    State.waiting_allowed = False
    try:
        yield
    finally:
        State.waiting_allowed = True
