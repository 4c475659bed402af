"""Asks torch about its state: autocast, tracing, a backward pass, global hooks.

Most of these questions have no public answer, so the private names of torch stand here, in one file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch.nn.modules.module import _global_forward_hooks

Function = TypeVar("Function", bound=Callable[..., Any])


def as_constant(function: Function) -> Function:
    """Mark a pure function, so that torch.compile treats its results as constants.

    This does the same as `torch.compiler.assume_constant_result`, without loading the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@as_constant
def has_autocast(device: str) -> bool:
    """Return True if a device type has autocast. torch.compile takes the answer as a constant, because
    torch 2.9 cannot trace its own function.

    Args:
        device: a device type, such as ``"cpu"``.
    """
    return torch.amp.is_autocast_available(device)


def is_autocast(device: str) -> bool:
    """Return True where autocast may change the dtype of a product.

    Args:
        device: a device type, such as ``"cpu"``.
    """
    return has_autocast(device) and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context that turns autocast off, so that results keep the dtype of the parameters.

    Args:
        device: a device type, such as ``"cpu"``; one without autocast gives a context that does nothing.
    """
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


def is_tracing() -> bool:
    """Return True under torch.compile, tracing, torch.func and FakeTensor, where caches and autograd
    Functions must not be used."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def is_in_backward() -> bool:
    """Return True inside a backward pass of this thread, as when a checkpoint runs its modules again."""
    return torch._C._current_graph_task_id() != -1


def has_global_forward_hooks() -> bool:
    """Return True if a forward hook is registered for all modules; it could keep any output."""
    return bool(_global_forward_hooks)


def not_compiled(function: Function) -> Function:
    """Return a function that torch.compile calls as it is, and does not trace.

    If the compiler is not loaded yet, which transformers does with its models, this returns the function
    itself: to load it takes seconds, and what is traced computes the same.
    """
    if "torch._dynamo" not in sys.modules:
        return function
    found: Function = torch.compiler.disable(function)
    return found


def forget_compiled() -> None:
    """Let torch.compile compile anew what it has compiled: it does not notice hooks that come or go, and
    would run a model without the adapter that was put on it since."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled
        torch.compiler.reset()


def integers(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Make a vector of integers on a device; on a GPU by kernels, since a copy from Python's memory waits.

    Args:
        values: the integers.
        device: where.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.long)
    each = [torch.full((1,), value, dtype=torch.long, device=device) for value in values]
    return torch.cat(each)


def has_saved_tensor_hooks() -> bool:
    """Return True if hooks for saved tensors are set, as by a checkpoint; also where torch cannot tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def is_capturing() -> bool:
    """Return True while a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def has_gradient_hooks(tensor: torch.Tensor) -> bool:
    """Return True if hooks wait for the gradient of a tensor."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)
