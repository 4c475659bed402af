"""Asks torch about its state: autocast, tracing, a backward pass, checkpoints, global hooks.

Most of these questions have no public answer, so the private names of torch stand here, in one file.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.nn.modules.module import _global_forward_hooks
from torch.utils import _python_dispatch as dispatch
from torch.utils import checkpoint

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
    """Return True under torch.compile, tracing, make_fx, torch.func, forward-mode derivatives and FakeTensor,
    where caches and autograd Functions must not be used."""
    modes = torch._C._TorchDispatchModeKey
    return (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(modes.FAKE) is not None
        or torch._C._get_dispatch_mode(modes.PROXY) is not None
        or torch._C._are_functorch_transforms_active()
        or is_interpreter_tracing()
        or forward_ad._current_level >= 0  # type: ignore[attr-defined]
    )


def is_recorded() -> bool:
    """Return True where the same operations have to run every time, and results must not be written to: while
    torch traces, and within a selective checkpoint, which keeps results of its first run for its second."""
    return is_tracing() or (
        torch._C._len_torch_dispatch_stack() > 0
        and any(
            isinstance(mode, _SELECTIVE) for mode in dispatch._get_current_dispatch_mode_stack()
        )
    )


def is_interpreter_tracing() -> bool:
    """Return True while torch.jit.trace records a forward."""
    return torch._C._get_tracing_state() is not None


@contextmanager
def not_traced() -> Iterator[None]:
    """Within this context torch.jit.trace records nothing, and sizes are integers as elsewhere."""
    state = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


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
    return bool(_top_saved_tensor_hooks() != ())


def _top_saved_tensor_hooks() -> Any:
    """Return the innermost hooks for saved tensors (pack, unpack); () if none is set, None where torch cannot
    tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(True) or ()


def is_batched(tensor: torch.Tensor) -> bool:
    """Return True for one of the tensors that autograd's ``is_grads_batched=True`` calculates with."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_capturing() -> bool:
    """Return True while a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def has_gradient_hooks(tensor: torch.Tensor) -> bool:
    """Return True if hooks wait for the gradient of a tensor."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


#: Functions of torch.utils.checkpoint that are on the call stack while a checkpointed function runs, in the
#: forward or again in the backward. Each maps its local variables to an object that both runs share: the
#: autograd node of a reentrant checkpoint, the record of the checkpoint otherwise.
_ON_STACK = {
    "forward": lambda values: values.get("ctx"),
    "backward": lambda values: values.get("ctx"),
    "checkpoint": lambda values: _suspended(values.get("gen")).get("new_frame"),
    "unpack_hook": lambda values: values.get("frame"),
}

#: The classes of these objects.
_CHECKPOINTS: Any = checkpoint._CheckpointFrame, checkpoint.CheckpointFunction._backward_cls  # type: ignore[attr-defined]


#: The modes of the first and the second run of a selective checkpoint.
_SELECTIVE: Any = (
    checkpoint._CachingTorchDispatchMode,  # type: ignore[attr-defined]
    checkpoint._CachedTorchDispatchMode,  # type: ignore[attr-defined]
)


def _suspended(generator: Any) -> dict[str, Any]:
    frame: FrameType | None = getattr(generator, "gi_frame", None)
    return {} if frame is None else frame.f_locals


def running_checkpoints() -> Iterator[object]:
    """Yield an object for each checkpoint that is running, innermost first. A checkpoint has the same object
    in the forward and in the run that repeats it."""
    innermost = _packing()
    if innermost is not None:
        yield innermost
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == checkpoint.__file__ and code.co_name in _ON_STACK:
            found = _ON_STACK[code.co_name](frame.f_locals)
            if found is not None and found is not innermost:
                yield found
        frame = frame.f_back


def _packing() -> object:
    """Return the record of the checkpoint whose hooks now pack saved tensors. A checkpoint that is made of
    module hooks (torch.distributed._composable) is not on the call stack."""
    hooks = _top_saved_tensor_hooks()
    code = getattr(hooks[0], "__code__", None) if hooks else None
    if code is None or code.co_filename != checkpoint.__file__ or "frame" not in code.co_freevars:
        return None
    return hooks[0].__closure__[code.co_freevars.index("frame")].cell_contents


def live_checkpoints() -> list[object]:
    """List the objects of all checkpoints whose functions may run again; see `running_checkpoints`.
    torch keeps no list, so this asks the garbage collector, which takes some milliseconds; and some more if
    there are any, since those that are garbage will never run."""
    if not _checkpoint_objects():
        return []
    gc.collect()
    return _checkpoint_objects()


def _checkpoint_objects() -> list[object]:
    return [each for each in gc.get_referrers(*_CHECKPOINTS) if type(each) in _CHECKPOINTS]


def remove_pre_hook(module: torch.nn.Module, hook: object) -> None:
    """Remove a forward pre-hook from a module, wherever its handle is."""
    hooks = module._forward_pre_hooks
    for key in [key for key, each in hooks.items() if each is hook]:
        hooks.pop(key, None)


def children_of(module: torch.nn.Module) -> dict[str, torch.nn.Module | None]:
    """Return the dictionary in which a module keeps its children by name, and no copy of it."""
    return module._modules


def hooks_of(module: torch.nn.Module) -> list[object]:
    """List the hooks that run before and behind a module's forward."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def saved_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's own buffers that its state dict contains, by name."""
    hidden = module._non_persistent_buffers_set
    return {name: t for name, t in module.named_buffers(recurse=False) if name not in hidden}
