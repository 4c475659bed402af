"""What torch is doing now: the one place for its private names.

Read against torch 2.4 to 2.13; tests/test_private_names.py checks that each name is still there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch.nn.modules.module import _global_forward_hooks

Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context without autocast, where there is one: results have the dtype of the parameters.

    Args:
        device: the type of the device, such as ``"cpu"``.
    """
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def is_tracing() -> bool:
    """True under torch.compile, tracing, torch.func and FakeTensor, where caches and autograd Functions
    must not be used."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def as_constant(function: Function) -> Function:
    """Let torch.compile take the results of a pure function as constants.

    What `torch.compiler.assume_constant_result` does, without loading the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_in_backward() -> bool:
    """True within a backward of this thread, as where a checkpoint runs its modules again."""
    return torch._C._current_graph_task_id() != -1


def has_global_forward_hooks() -> bool:
    """True where a hook of all modules may keep any output."""
    return bool(_global_forward_hooks)
