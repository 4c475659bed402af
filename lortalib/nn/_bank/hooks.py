"""The hooks of a bank: they read how many rows a forward has, and add the update of each row."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..._torch import is_tracing
from .._anatomy import Site
from .._forward import (
    Handle,
    add_update,
    by_module,
    detach,
    place_of,
    put_hook,
    slots_of,
    watch_forwards,
)
from .batch import CurrentBatch

#: Attention classes that compute with time before batch: their rows are not those of the batch.
_TIME_FIRST = frozenset(
    (
        "LEDEncoderSelfAttention",
        "LongformerSelfAttention",
        "Mask2FormerAttention",
        "OneFormerAttention",
    )
)

#: Arguments of transformers whose first axis is the batch, the most telling first.
_BATCH_ARGUMENTS = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_values",
    "input_features",
    "decoder_input_ids",
    "decoder_inputs_embeds",
)


class BatchSizeHook:
    """Reads from the arguments of the model how many rows its forward has; a forward pre-hook.

    Args:
        current: what the rows gathered.
        model: the model, whose signature orders the arguments.
    """

    def __init__(self, current: CurrentBatch, model: nn.Module) -> None:
        parameters = inspect.signature(model.forward).parameters.values()
        by_name = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self._current = current
        self._names = [p.name for p in parameters if p.kind not in by_name]
        self._positional = [
            p.name for p in parameters if p.kind not in (*by_name, inspect.Parameter.KEYWORD_ONLY)
        ]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Torch's forward pre-hook with keyword arguments."""
        batch = self._current.get()
        if batch is not None:
            sizes = self._sizes(args, kwargs)
            batch.begin(self._current.scope.running, _batch_size(sizes, batch.size))

    def _sizes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
        """Leading sizes of the tensors of two axes or more, in the order of the signature."""
        given = {**dict(zip(self._positional, args)), **kwargs}
        named = [(name, given[name]) for name in self._names if name in given]
        rest = [(name, value) for name, value in kwargs.items() if name not in self._names]
        extra = [(f"*{k}", value) for k, value in enumerate(args[len(self._positional) :])]
        return {
            name: len(value)
            for name, value in (*named, *extra, *rest)
            if isinstance(value, Tensor) and value.dim() > 1
        }


def _batch_size(sizes: Mapping[str, int], rows: int) -> int | None:
    """The size of the batch: that of a telling argument, else the first that the rows divide."""
    for name in _BATCH_ARGUMENTS:
        if name in sizes:
            return sizes[name]
    divided = (size for size in sizes.values() if size % rows == 0)
    return next(divided, next(iter(sizes.values()), None))


class RowUpdate:
    """Adds at a module to every row the update of the row's own adapter.

    Args:
        current: what the rows gathered.
        path: of the module, for messages.
        sites: the sites of the module.
    """

    def __init__(self, current: CurrentBatch, path: str, sites: Sequence[Site]) -> None:
        self._current = current
        self._path = path
        self._slots = slots_of(current, sites)
        self.place = place_of(self._slots)

    @property
    def is_on(self) -> bool:
        """Whether the rows of the forward under way have gathered anything."""
        return self._current.get() is not None

    def __call__(self, x: Tensor, y: Tensor, may_write: bool = False) -> Tensor:
        """Add the updates of the rows.

        Args:
            x: what they read, (rows, ..., features).
            y: what they are added to.
            may_write: whether nobody else uses y, so that it can be added to in place.

        Raises:
            ValueError: x does not have the rows of the batch.
        """
        batch = self._current.get()
        assert batch is not None, "a hook asks whether it is on"
        scope = self._current.scope
        batch.check(x, self._path, scope.running)
        running = None if is_tracing() else scope.running
        for slot in self._slots:
            pair, users = batch.pair(slot, y.dtype, y.device), slot.source.users(slot.number)
            y = add_update(running, x, y, pair, users, 0.0, may_write)
            may_write = running is not None
        return y


def attach_rows(model: nn.Module, current: CurrentBatch, handles: list[Handle]) -> None:
    """Let every module that a bank updates add the updates of its rows.

    Args:
        model: the model.
        current: what the rows gathered.
        handles: gets what takes each hook off again. Where this fails, nothing is left on the model.
    """
    groups = [source.group for source in current.sources]
    updates = [
        (model.get_submodule(path), RowUpdate(current, path, sites))
        for path, sites in by_module(site for group in groups for site in group.sites)
    ]
    for source in current.sources:
        source.prepare()
    try:
        for handle in watch_forwards(model, current.scope, groups):
            handles.append(handle)
        # Behind the hook that begins a forward: the size belongs to that forward.
        size = BatchSizeHook(current, model)
        handles.append(model.register_forward_pre_hook(size, with_kwargs=True))
        for module, update in updates:
            handles.append(put_hook(module, update))
    except BaseException:
        detach(handles)
        raise


def check_rows(model: nn.Module, site: Site) -> None:
    """Refuse a projection whose input does not have the rows of the batch.

    Raises:
        ValueError: packed experts, a weight read directly, attention that puts time before batch.
    """
    for path in (site.path, *site.tied_paths):
        owner = type(model.get_submodule(path.rpartition(".")[0])).__name__
        if site.experts or site.weight_read_directly or owner in _TIME_FIRST:
            why = "packs experts" if site.experts else "does not see the batch as rows"
            raise ValueError(
                f"{path} {why}, so the rows of a batch cannot have adapters of their own "
                "there; leave it out of targets"
            )
