"""Multiplies the tokens of a module by the two maps of a low-rank pair."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from ..._torch import is_autocast, is_tracing
from .rows import EvenRows, Layout

_unsafe_view = torch.ops.aten._unsafe_view.default
_WIDE = torch.float32, torch.float64


def down(x: Tensor, a: Tensor, p: float, layout: Layout | None = None) -> Tensor:
    """Compute ``x @ a^T`` in the dtype of ``a``.

    Args:
        x: (..., features), or (..., heads * features) if ``a`` maps the features of one head.
        a: (p, features), or (rows, p, features) if each row of a batch has its own map.
        p: probability of dropping a feature of x.
        layout: the arrangement of the tokens in rows; x is divided equally over the rows by default.

    Returns:
        (..., p), or (..., heads, p).
    """
    if x.dtype != a.dtype:
        x = x.to(a.dtype)
    if a.dim() == 3:
        layout = layout or EvenRows(len(a))
        return layout.join(layout.split(x) @ a.mT).view(*x.shape[:-1], -1)
    if x.shape[-1] != a.shape[-1]:
        x = x.unflatten(-1, (-1, a.shape[-1]))
    h = _product(dropout(x, p) if p else x, a)
    return h if h.dtype == a.dtype else h.to(a.dtype)


def _product(x: Tensor, a: Tensor) -> Tensor:
    """Compute ``x @ a^T``, by the faster of two ways.

    A processor's library fills its vectors along the last axis of the result. Where the rank leaves half a
    vector or less empty, ``a @ x^T``, whose last axis is the tokens, is mostly faster: with one thread and
    with two it took 0.4 to 1.0 of the time (docs/performance.md). Autograd computes the gradient in the same
    layout.
    """
    is_plain = x.device.type == "cpu" and x.dtype in _WIDE and not is_tracing()
    if not is_plain or len(a) % 16 < 8 or x.numel() < 32 * x.shape[-1]:
        return linear(x, a)
    return torch.mm(a, x.reshape(-1, x.shape[-1]).t()).t().view(*x.shape[:-1], len(a))


def add_up(
    y: Tensor, h: Tensor, b: Tensor, may_write: bool, layout: Layout | None = None
) -> Tensor:
    """Compute ``y + h @ b``.

    Args:
        y: (..., features), or (..., heads * features) if ``b`` maps to the features of one head.
        h: (..., p), or (..., heads, p).
        b: (p, features), or (rows, p, features) if each row of a batch has its own map.
        may_write: whether y may be changed in place, because no other code uses it; must be False while
            torch traces.
        layout: the arrangement of the tokens in rows; y is divided equally over the rows by default.
    """
    if b.dim() == 3:
        return _add_by_row(y, h, b, may_write, layout or EvenRows(len(b)))
    if not y.is_contiguous():
        return y + (h @ b).view(y.shape)
    if not may_write:
        if y.dtype == h.dtype == b.dtype and not is_autocast(y.device.type):
            # addmm needs one pass over y less than a product and a sum.
            return torch.addmm(y.view(-1, b.shape[-1]), h.reshape(-1, h.shape[-1]), b).view(y.shape)
        return y + (h @ b).view(y.shape)
    if not torch.is_grad_enabled():
        y.view(-1, b.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), b)
        return y
    # With an ordinary view, autograd would copy the gradient because of the change in place.
    flat = _unsafe_view(y, (-1, b.shape[-1]))
    flat.addmm_(h.reshape(-1, h.shape[-1]), b)
    return _unsafe_view(flat, y.shape)  # type: ignore[no-any-return]


def _add_by_row(y: Tensor, h: Tensor, b: Tensor, may_write: bool, layout: Layout) -> Tensor:
    """Compute `add_up` with one map for each row of a batch."""
    h = layout.split(h)
    even = isinstance(layout, EvenRows)
    if even and may_write and y.is_contiguous() and not torch.is_grad_enabled():
        y.view(len(b), -1, y.shape[-1]).baddbmm_(h, b)
        return y
    return y + layout.join(h @ b).view(y.shape)
