"""The arithmetic of a low-rank update: ``h = x A^T``, then ``y += h B``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

_unsafe_view = torch.ops.aten._unsafe_view.default


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


def add_up(y: Tensor, h: Tensor, b: Tensor, may_write: bool) -> Tensor:
    """``y + h @ b``.

    Args:
        y: (..., features).
        h: (..., p).
        b: (p, features), or (rows, p, features) where each row of a batch has a map of its own.
        may_write: whether nobody else uses y, so that it can be added to in place; never while torch traces.
    """
    if b.dim() == 3:
        return _add_by_row(y, h, b, may_write)
    if not may_write or not y.is_contiguous():
        return y + h @ b
    if not torch.is_grad_enabled():
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), b)
        return y
    # Not as a view: autograd would copy the gradient for writing to one.
    flat = _unsafe_view(y, (-1, y.shape[-1]))
    flat.addmm_(h.reshape(-1, h.shape[-1]), b)
    return _unsafe_view(flat, y.shape)  # type: ignore[no-any-return]


def _add_by_row(y: Tensor, h: Tensor, b: Tensor, may_write: bool) -> Tensor:
    """`add_up` with a map for each of the rows that share y evenly."""
    if may_write and y.is_contiguous() and not torch.is_grad_enabled():
        y.view(len(b), -1, y.shape[-1]).baddbmm_(h, b)
        return y
    return y + (h @ b).view(y.shape)
