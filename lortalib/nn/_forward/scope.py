"""Keeps the data of one forward: its low-rank pairs, and the product that q, k and v share.

A forward here is the forward of the outermost module around projections, whichever part of the model is
called. A forward reuses the pairs of the forward before if no parameter, nor any of its values, has
changed since; otherwise it makes new pairs once. No other data of a forward is kept after its end.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch import is_capturing, is_in_backward
from .module_sites import Pair
from .pairs import PairSource
from .places import Places
from .rows import Layout
from .thin_products import down


@dataclass
class CachedProduct:
    """A product ``x @ first^T``, with the state that must be unchanged for the product to be reused."""

    x: weakref.ref[Tensor]
    mark: tuple[Any, ...]
    first: Tensor
    h: Tensor
    left: int


class PairSet:
    """The pairs that a forward made from its sources, and the state of the parameters at that time."""

    def __init__(self, sources: Sequence[PairSource]) -> None:
        self._sources = sources
        self._state = _state(sources)
        tensors = _tensors(sources)
        # On a GPU a comparison would wait for the device, which costs more than making the pairs again.
        comparable = all(t.device.type == "cpu" for t in tensors)
        self._numbers = [t.detach().clone() for t in tensors] if comparable else None
        self._made: dict[tuple[Any, ...], list[list[Pair]]] = {}

    def of(self, source: PairSource, dtype: torch.dtype, device: torch.device) -> list[list[Pair]]:
        """Return the pairs of a source by layer and signature, for the present mode of autograd."""
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        key = id(source), dtype, device, mode
        if key not in self._made:
            self._made[key] = source.pairs(dtype, device)
        return self._made[key]

    @property
    def backwards(self) -> int:
        """The number of backwards that reached the parameters."""
        return sum([source.backwards.value for source in self._sources])

    def is_current(self, compare: bool) -> bool:
        """Return True if the parameters are unchanged since the pairs were made.

        Args:
            compare: whether values are compared too. Otherwise only identity, version, memory and
                ``requires_grad`` of the parameters are compared, which writes through ``p.data`` and by
                some fused optimisers do not change.
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
        return []  # inference tensors count no versions, and meta tensors have no values
    return [(id(t), t._version, t.data_ptr(), t.requires_grad) for t in tensors]


@dataclass
class Running:
    """The forward that is under way in a thread.

    Attributes:
        module: the outermost module around projections.
        frame: frame of the module's call.
        scope: the scope that the forward belongs to.
        product: the last product with an A that several modules share.
    """

    module: nn.Module
    frame: FrameType
    scope: ForwardScope
    product: CachedProduct | None = None

    @cached_property
    def pairs(self) -> PairSet:
        """The pairs of this forward; the first module that adds an update asks for them."""
        return self.scope.current_pairs()

    def pair(
        self,
        source: PairSource,
        number: int,
        layer: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Pair:
        """Return the pair of one module; the pairs of all layers are made at once."""
        return self.pairs.of(source, dtype, device)[layer][number]

    def product_of(
        self, x: Tensor, first: Tensor, users: int, p: float, layout: Layout | None = None
    ) -> Tensor:
        """Compute ``x @ first^T`` once for all modules of a layer that share x and first.

        The product is reused only for the same tensor objects x and first, only while x is unchanged, and
        only before a backward, which frees the product's graph.

        Args:
            x: (..., features).
            first: (p, features), or (rows, p, features) if each row of a batch has its own map.
            users: number of modules of a layer that have this first.
            p: probability of dropping a feature of x; all modules that share x share one mask.
            layout: the arrangement of the tokens in rows, as for `down`.
        """
        if users == 1 or x.is_inference():  # inference tensors count no changes
            return down(x, first, p, layout)
        known = self.product
        backwards = self.pairs.backwards
        mark = x._version, x.requires_grad, torch.is_grad_enabled(), p, backwards
        if known is not None and known.x() is x and known.first is first and known.mark == mark:
            known.left -= 1
            if known.left == 0:
                self.product = None
            return known.h
        h = down(x, first, p, layout)
        self.product = CachedProduct(weakref.ref(x), mark, first, h, users - 1)
        return h

    def is_on_stack(self) -> bool:
        """Return True if the module's call is still running; an interrupt can end it before its end hook."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is self.frame:
                return True
            frame = frame.f_back
        return False


class ForwardScope:
    """Tracks the forwards of the modules that one adapter or bank updates, separately in each thread.

    Args:
        sources: the sources of the pairs; the list may still grow.
    """

    _places: Places | None = None  # a copy has none, until `watch`
    _local: threading.local
    _last: PairSet | None  # the pairs of the previous forward

    def __init__(self, sources: Sequence[PairSource]) -> None:
        self._sources = sources
        self._keeping = 0  # contexts of `keep` that are open
        self.forget()

    @property
    def running(self) -> Running | None:
        """The forward under way in this thread; None outside of a forward."""
        return getattr(self._local, "running", None)

    def begin(self, module: nn.Module, frame: FrameType) -> None:
        """Begin the forward of a module around projections, unless another forward contains it.

        Args:
            module: the module.
            frame: frame of the module's call.
        """
        running = self.running
        if running is not None and running.module is not module and running.is_on_stack():
            return
        self._local.running = Running(module, frame, self)

    def place(self, model: nn.Module, paths: Iterable[str]) -> Places:
        """Watch the places of updated modules, on which the hooks are.

        Args:
            model: the model.
            paths: the paths of the modules.

        Returns:
            The handle that ends this.
        """
        self._places = Places(model, paths)
        return self._places

    def watch(self, places: Places | None) -> None:
        """Watch places that a copy of the model brought along; its scope, which modules refer to that are
        copied alone too, did not.

        Args:
            places: the places; None changes nothing.
        """
        if self._places is None:
            self._places = places

    def check_places(self) -> None:
        """Refuse a forward from which updates would be missing.

        Raises:
            RuntimeError: other code has put another module where an updated one was.
        """
        replaced = self._places.replaced() if self._places is not None else []
        if replaced:
            raise RuntimeError(
                f"{replaced[0]} is another module than the one that was given its update"
                + f", and so are {len(replaced) - 1} more" * (len(replaced) > 1)
                + ": the forward would leave the update out. Replace modules before apply, load or bank; or "
                "now save the adapter or the bank, remove it, and load it again"
            )

    def current_pairs(self) -> PairSet:
        """Return the pairs of the previous forward if no parameter changed since, else make new pairs."""
        # Within a backward (a checkpoint runs its modules again) no optimiser writes to the parameters.
        compare = not (self._keeping or is_in_backward())
        pairs = self._last
        if pairs is None or not pairs.is_current(compare):
            pairs = PairSet(self._sources)
            # Tensors that a CUDA graph captures have values only after the graph is replayed.
            self._last = None if is_capturing() else pairs
        return pairs

    def end(self, module: nn.Module) -> None:
        """End the forward of a module around projections."""
        running = self.running
        if running is None:
            return
        running.product = None
        if running.module is module:
            self._local.running = None

    def forget(self) -> None:
        """Drop all cached pairs."""
        self._local = threading.local()
        self._last = None

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Let forwards within a context reuse pairs without comparing values; see `PairSet.is_current`."""
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
