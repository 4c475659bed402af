"""The arithmetic of a share: ``y += (x @ first^T) @ second``."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..decomp._contract import is_tracing

_unsafe_view = torch.ops.aten._unsafe_view.default


@dataclass
class _Kept:
    """A product that `Reads` keeps, and what has to be the same for it to be used."""

    x: weakref.ref[Tensor]
    mark: tuple[Any, ...]
    first: Tensor
    h: Tensor
    left: int


class Reads:
    """``x @ first^T``, taken once where several projections of a layer read one x (q, k, v).

    The last product is kept while a module around the projections runs, until as many have asked for
    it as read it, or another x comes. It is given out again only for the very same x, unchanged, and
    the very same first, and not once a backward has passed, which frees the graph behind it.

    Attributes:
        backwards: how many backwards have passed the adapter's parameters.
        forwards: how many forwards of an outermost module have begun.
        around: the outermost module around projections whose forward runs; None where a projection
            is called by itself.
    """

    def __init__(self) -> None:
        self.backwards = 0
        self.forwards = 0
        self.around: nn.Module | None = None
        self._kept: _Kept | None = None

    def enter(self, module: nn.Module) -> bool:
        """The forward of a module around projections begins.

        Returns:
            Whether it is the outermost.
        """
        outermost = self.around is None
        if outermost:
            self.around = module
            self.forwards += 1
        return outermost

    def leave(self, module: nn.Module) -> None:
        """The forward of a module around projections ends; nothing of it is kept."""
        self._kept = None
        if self.around is module:
            self.around = None

    def project(self, x: Tensor, first: Tensor, readers: int, p: float) -> Tensor:
        """The product, in the dtype of ``first``.

        Args:
            x: (..., features).
            first: (p, features), or (rows, p, features) for rows of a batch with maps of their own.
            readers: how many projections share x and first.
            p: probability of dropping a feature of x; one mask for all that share x.
        """
        if readers == 1 or self.around is None or is_tracing() or x.is_inference():
            return project(x, first, p)  # inference tensors count no changes
        kept = self._kept
        mark = x._version, x.requires_grad, torch.is_grad_enabled(), p, self.backwards
        if kept is not None and kept.x() is x and kept.first is first and kept.mark == mark:
            kept.left -= 1
            if kept.left == 0:
                self._kept = None
            return kept.h
        h = project(x, first, p)
        self._kept = _Kept(weakref.ref(x), mark, first, h, readers - 1)
        return h

    def __getstate__(self) -> dict[str, Any]:
        return {"backwards": 0, "forwards": 0, "around": None, "_kept": None}


def project(x: Tensor, first: Tensor, p: float) -> Tensor:
    """``x @ first^T``, nothing kept; the arguments are those of `Reads.project`."""
    if x.dtype != first.dtype:
        x = x.to(first.dtype)
    if first.dim() == 3:  # rows with maps of their own; each has an equal part of x
        return x.reshape(len(first), -1, x.shape[-1]) @ first.mT
    h = linear(dropout(x, p) if p else x, first)
    return h if h.dtype == first.dtype else h.to(first.dtype)


def add(y: Tensor, h: Tensor, second: Tensor, own: bool) -> Tensor:
    """``y + h @ second``.

    Args:
        y: (..., features).
        h: (..., p).
        second: (p, features).
        own: whether nobody else holds y, so that it can be added to in place.
    """
    if second.dim() == 3:
        return _add_by_row(y, h, second, own)
    if not own or is_tracing() or not y.is_contiguous():
        return y + h @ second
    if not torch.is_grad_enabled():
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), second)
        return y
    # Not as a view: autograd would copy the gradient for writing to one.
    flat = _unsafe_view(y, (-1, y.shape[-1]))
    flat.addmm_(h.reshape(-1, h.shape[-1]), second)
    return _unsafe_view(flat, y.shape)  # type: ignore[no-any-return]


def _add_by_row(y: Tensor, h: Tensor, second: Tensor, own: bool) -> Tensor:
    """`add` with a second map for each of the rows that share y evenly."""
    if own and y.is_contiguous() and not torch.is_grad_enabled():
        y.view(len(second), -1, y.shape[-1]).baddbmm_(h, second)
        return y
    return y + (h @ second).view(y.shape)
