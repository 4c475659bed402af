"""What belongs to one forward: its low-rank pairs, and the product that q, k and v share.

A forward here is that of the outermost module around projections, whichever part of the model is
called. It begins by asking whether the pairs of the forward before are those of the parameters as they are
now, numbers included; if not, it makes its own, once. Nothing else of a forward outlives it.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..._torch import is_capturing, is_in_backward
from .pairs import Pair, PairSource


def down(x: Tensor, a: Tensor, p: float) -> Tensor:
    """``x @ a^T``, in the dtype of ``a``.

    Args:
        x: (..., features).
        a: (p, features), or (rows, p, features) where each row of a batch has a map of its own.
        p: probability of dropping a feature of x.
    """
    if x.dtype != a.dtype:
        x = x.to(a.dtype)
    if a.dim() == 3:  # each row has an equal part of x
        return x.reshape(len(a), -1, x.shape[-1]) @ a.mT
    h = linear(dropout(x, p) if p else x, a)
    return h if h.dtype == a.dtype else h.to(a.dtype)


@dataclass
class CachedProduct:
    """``x @ first^T``, and what has to be the same for it to be used again."""

    x: weakref.ref[Tensor]
    mark: tuple[Any, ...]
    first: Tensor
    h: Tensor
    left: int


class PairSet:
    """The pairs that a forward made of its sources, and the parameters as they were then."""

    def __init__(self, sources: Sequence[PairSource]) -> None:
        self._sources = sources
        self._state = _state(sources)
        tensors = _tensors(sources)
        # On a GPU comparing would wait for the device, which costs more than making the pairs again.
        comparable = all(t.device.type == "cpu" for t in tensors)
        self._numbers = [t.detach().clone() for t in tensors] if comparable else None
        self._made: dict[tuple[Any, ...], list[list[Pair]]] = {}

    def of(self, source: PairSource, dtype: torch.dtype, device: torch.device) -> list[list[Pair]]:
        """The pairs of a source by layer and signature, for the present mode of autograd."""
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        key = id(source), dtype, device, mode
        if key not in self._made:
            self._made[key] = source.pairs(dtype, device)
        return self._made[key]

    @property
    def backwards(self) -> int:
        """How many backwards have passed the parameters."""
        return sum([source.backwards.value for source in self._sources])

    def is_current(self, compare: bool) -> bool:
        """Whether the parameters are what the pairs were made of.

        Args:
            compare: whether numbers are compared too; else only the parameters' identity, version, memory
                and flag, in which writes through ``p.data`` and some fused optimisers leave no trace.
        """
        if not self._state or self._state != _state(self._sources):
            return False
        if not compare:
            return True
        kept = self._numbers
        return kept is not None and all(map(torch.equal, kept, _tensors(self._sources)))


def _tensors(sources: Sequence[PairSource]) -> list[Tensor]:
    found = {id(t): t for source in sources for t in source.network.stored}
    return list(found.values())


def _state(sources: Sequence[PairSource]) -> list[tuple[int, int, int, bool]]:
    tensors = _tensors(sources)
    if any(t.is_inference() or t.is_meta for t in tensors):
        return []  # inference tensors count no versions, and placeholders have no numbers
    return [(id(t), t._version, t.data_ptr(), t.requires_grad) for t in tensors]


@dataclass
class Running:
    """The forward that is under way in a thread.

    Attributes:
        module: the outermost module around projections.
        frame: of its call.
        scope: whose forward it is.
        product: the last product with an A that several modules share.
    """

    module: nn.Module
    frame: FrameType
    scope: ForwardScope
    product: CachedProduct | None = None

    @cached_property
    def pairs(self) -> PairSet:
        """The pairs of this forward; asked for by the first module that adds an update."""
        return self.scope.current_pairs()

    def pair(
        self,
        source: PairSource,
        number: int,
        layer: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Pair:
        """The pair of one module, made with those of all layers."""
        return self.pairs.of(source, dtype, device)[layer][number]

    def product_of(self, x: Tensor, first: Tensor, users: int, p: float) -> Tensor:
        """``x @ first^T``, taken once where several modules of a layer have one x and one first.

        The product is given out again only for the very same x, unchanged, and the very same first,
        and not after a backward, which frees the graph behind it.

        Args:
            x: (..., features).
            first: (p, features), or (rows, p, features) for rows of a batch with maps of their own.
            users: how many modules of a layer have this first.
            p: probability of dropping a feature of x; one mask for all that share x.
        """
        if users == 1 or x.is_inference():  # inference tensors count no changes
            return down(x, first, p)
        known = self.product
        backwards = self.pairs.backwards
        mark = x._version, x.requires_grad, torch.is_grad_enabled(), p, backwards
        if known is not None and known.x() is x and known.first is first and known.mark == mark:
            known.left -= 1
            if known.left == 0:
                self.product = None
            return known.h
        h = down(x, first, p)
        self.product = CachedProduct(weakref.ref(x), mark, first, h, users - 1)
        return h

    def is_on_stack(self) -> bool:
        """Whether the call is still under way: an interrupt ends it without a word to its hooks."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is self.frame:
                return True
            frame = frame.f_back
        return False


class ForwardScope:
    """The forwards of the modules that one adapter, or one bank, updates. Each thread has its own.

    Args:
        sources: what makes the pairs; the list may still grow.
    """

    _local: threading.local
    _last: PairSet | None  # the pairs of the forward before

    def __init__(self, sources: Sequence[PairSource]) -> None:
        self._sources = sources
        self._keeping = 0  # contexts of `keep` that are open
        self.forget()

    @property
    def running(self) -> Running | None:
        """The forward under way in this thread."""
        return getattr(self._local, "running", None)

    def begin(self, module: nn.Module, frame: FrameType) -> None:
        """The forward of a module around projections begins; nothing happens inside of another.

        Args:
            module: the module.
            frame: of its call.
        """
        running = self.running
        if running is not None and running.module is not module and running.is_on_stack():
            return
        self._local.running = Running(module, frame, self)

    def current_pairs(self) -> PairSet:
        """The pairs of the forward before, if they are those of the parameters as they are now, else new
        ones."""
        # Within a backward, as where a checkpoint runs its modules again, nobody writes unseen.
        compare = not (self._keeping or is_in_backward())
        pairs = self._last
        if pairs is None or not pairs.is_current(compare):
            pairs = PairSet(self._sources)
            # What a CUDA graph captures holds numbers only once the graph is replayed.
            self._last = None if is_capturing() else pairs
        return pairs

    def end(self, module: nn.Module) -> None:
        """The forward of a module around projections ends."""
        running = self.running
        if running is None:
            return
        running.product = None
        if running.module is module:
            self._local.running = None

    def forget(self) -> None:
        """Let go of all pairs."""
        self._local = threading.local()
        self._last = None

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Let forwards within this context use pairs without comparing numbers; see `PairSet.is_current`."""
        self._keeping += 1
        try:
            yield
        finally:
            self._keeping -= 1

    def __getstate__(self) -> dict[str, Any]:
        return {"_sources": self._sources}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._sources, self._keeping = state["_sources"], 0
        self.forget()
