"""Defines the hooks of a bank, which read the number of rows of a forward and add each row's update."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch import forget_compiled, is_recorded, is_tracing
from .._adapters import adapters
from .._anatomy import Site
from .._base_weights import weight_name
from .._forward import (
    Handle,
    Places,
    Slot,
    add_update,
    by_module,
    detach,
    place_of,
    put_hook,
    slots_of,
    watch_forwards,
)
from .batch import CurrentBatch
from .home import BankHome

#: Attention classes that put time before batch: their first axis is not the batch.
_TIME_FIRST = frozenset(
    (
        "LEDEncoderSelfAttention",
        "LongformerSelfAttention",
        "Mask2FormerAttention",
        "OneFormerAttention",
    )
)

#: Arguments of transformers models whose first axis is the batch, the most reliable first.
_BATCH_ARGUMENTS = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_values",
    "input_features",
    "decoder_input_ids",
    "decoder_inputs_embeds",
)

_TEXTS = {"input_ids", "inputs_embeds"}

#: Arguments of which a row of texts can have several, or none.
_MEDIA = (
    "pixel_values",
    "pixel_values_images",
    "pixel_values_videos",
    "input_values",
    "input_features",
)

#: The variable of sentence-transformers that holds the order into which a call sorts its texts.
_ORDER = "length_sorted_idx"


#: In a pickle of the model: what its bank's home contains.
_HOME = "content of the home"


class BatchSizeHook:
    """A forward pre-hook that reads the number of rows from the arguments of the model.

    Args:
        current: the gathered tensors of the current context.
        model: the model, whose signature orders the arguments.
        stream: the sites, if the bank acts on the stream.
        home: the home of the bank, which a copy of the model fills again.

    Attributes:
        places: the places of the updated modules, once they have their hooks; a copy of the model has them.
    """

    def __init__(
        self,
        current: CurrentBatch,
        model: nn.Module,
        stream: Sequence[Site],
        home: BankHome | None = None,
    ) -> None:
        parameters = inspect.signature(model.forward).parameters.values()
        by_name = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self._current, self._stream, self._home = current, stream, home
        self.places: Places | None = None
        self._names = [p.name for p in parameters if p.kind not in by_name]
        self._positional = [
            p.name for p in parameters if p.kind not in (*by_name, inspect.Parameter.KEYWORD_ONLY)
        ]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the number of rows; torch calls this with the arguments of the forward."""
        batch = self._current.get()
        if batch is not None:
            if not is_tracing():
                self._current.scope.watch(self.places)
                self._current.scope.check_places()
                if self._stream:
                    check_unmerged(module, self._stream)
                if batch.size > 1:
                    _check_unsorted()
            sizes = self._sizes(args, kwargs)
            media = [sizes[name] for name in _MEDIA if name in sizes and sizes.keys() & _TEXTS]
            batch.begin(self._current.scope.running, _batch_size(sizes, batch.size), media)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, _HOME: self._home and vars(self._home)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        home, content = state["_home"], state.pop(_HOME)
        self.__dict__ = state
        if home is not None:
            vars(home).update(content)

    def _sizes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
        """Return the leading sizes of all tensors with two or more axes, in the order of the signature."""
        given = {**dict(zip(self._positional, args)), **kwargs}
        named = [(name, given[name]) for name in self._names if name in given]
        rest = [(name, value) for name, value in kwargs.items() if name not in self._names]
        extra = [(f"*{k}", value) for k, value in enumerate(args[len(self._positional) :])]
        return {
            name: len(value)
            for name, value in (*named, *extra, *rest)
            if isinstance(value, Tensor) and value.dim() > 1
        }


def _check_unsorted() -> None:
    """Refuse names of rows within a call that sorts its texts, so that a row would have another's name."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _ORDER in frame.f_code.co_varnames:
            raise ValueError(
                "encode and predict of sentence-transformers sort texts by length, so names of rows would "
                "go to other texts; name one for all, or call the model itself, as in "
                "model(model.tokenize(texts)), which keeps the order"
            )
        frame = frame.f_back


def _batch_size(sizes: Mapping[str, int], rows: int) -> int | None:
    """Find the batch size: that of a reliable argument, else the first multiple of the number of rows."""
    for name in _BATCH_ARGUMENTS:
        if name in sizes:
            return sizes[name]
    divided = (size for size in sizes.values() if size % rows == 0)
    return next(divided, next(iter(sizes.values()), None))


class RowUpdate:
    """Adds the update of its own adapter to every row of a module's output.

    Args:
        current: the gathered tensors of the current context.
        path: the path of the module, for error messages.
        sites: the sites of the module.
    """

    def __init__(self, current: CurrentBatch, path: str, sites: Sequence[Site]) -> None:
        self._current = current
        self._path = path
        self._slots = slots_of(current, sites)
        self._features: dict[tuple[str, int, torch.device], Tensor] = {}
        self.place = place_of(self._slots)

    @property
    def is_on(self) -> bool:
        """True if the rows of the running forward gathered tensors."""
        return self._current.get() is not None

    def __call__(self, x: Tensor, y: Tensor, may_write: bool = False) -> Tensor:
        """Add the updates of the rows.

        Args:
            x: the input of the module, (rows, ..., features).
            y: the output of the module.
            may_write: whether nothing else uses y, so that the update can be added in place.

        Raises:
            ValueError: x does not have the rows of the batch.
        """
        batch = self._current.get()
        assert batch is not None, "a hook asks whether it is on"
        scope = self._current.scope
        batch.check(x, self._path, scope.running)
        running = None if is_recorded() else scope.running
        for slot in self._slots:
            pair, maps = batch.pair(slot, y.dtype, y.device, running)
            features = self._features_of(slot, y.device) if maps.middle is not None else None
            rest = pair, slot.source.users(slot.number), 0.0
            if features is None:
                y = add_update(running, x, y, *rest, may_write, maps)
            elif slot.source.signature(slot.number).writer:  # the heads are a part of what it reads
                y = add_update(running, x.index_select(-1, features), y, *rest, may_write, maps)
            else:
                own = y.index_select(-1, features)
                own = add_update(running, x, own, *rest, running is not None, maps)
                y = y.index_copy(-1, features, own)
            may_write = running is not None
        return y

    def _features_of(self, slot: Slot, device: torch.device) -> Tensor | None:
        """Return the positions of a part of a fused projection on the axis of its features, read or
        written."""
        rows = slot.source.signature(slot.number).sites[0].rows
        if rows is None:
            return None
        key = slot.source.group.name, slot.number, device
        if key not in self._features:
            with torch.inference_mode(False):  # later forwards use them in any mode
                self._features[key] = rows.index(device)
        return self._features[key]


def attach_rows(
    model: nn.Module,
    current: CurrentBatch,
    handles: list[Handle],
    home: BankHome | None = None,
) -> None:
    """Put hooks on every module that a bank updates, so that the rows' updates are added.

    Args:
        model: the model.
        current: the gathered tensors of the current context.
        handles: a list that gets the handle of each hook. If this fails, no hook stays on the model.
        home: the home of the bank, which a copy of the model fills again.
    """
    groups = [source.group for source in current.sources]
    updates = {
        path: RowUpdate(current, path, sites)
        for path, sites in by_module(site for group in groups for site in group.sites)
    }
    for source in current.sources:
        source.prepare()
    try:
        for handle in watch_forwards(model, current.scope, groups):
            handles.append(handle)
        # After the hook that begins a forward, because the size belongs to that forward.
        stream = [site for group in groups if group.on_stream for site in group.sites]
        size = BatchSizeHook(current, model, stream, home)
        handles.append(model.register_forward_pre_hook(size, with_kwargs=True))
        for path, update in updates.items():
            handles.append(put_hook(model.get_submodule(path), update))
        size.places = current.scope.place(model, updates)
        handles.append(size.places)
    except BaseException:
        detach(handles)
        raise
    finally:
        forget_compiled()


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


def check_unmerged(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse rows on the stream that would meet a merged weight: their product belongs to neither.

    Args:
        model: the model.
        sites: the sites of a bank on the stream.

    Raises:
        ValueError: an adapter is merged into the weight of one of the sites.
    """
    merged = {name: each for name, each in adapters(model).items() if each.merged}
    own = {weight_name(site): site.path for site in sites} if merged else {}
    for name, adapter in merged.items():
        for site in adapter.sites:
            if weight_name(site) in own:
                raise ValueError(
                    f"the bank acts on the stream that {site.path} reads or writes, and adapter "
                    f"{name!r} is merged into its weight; unmerge it first"
                )
