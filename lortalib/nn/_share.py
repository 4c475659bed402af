"""What one projection adds to its output: the forward hook of an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..decomp import Cut
from ._anatomy import Site

if TYPE_CHECKING:
    from ._adapter import Adapter


def low_rank(x: Tensor, pair: Cut, writer: bool, scaling: float) -> Tensor:
    """``scaling * x @ dW^T`` without dW, computed in the dtype of ``x``.

    Args:
        x: (..., in) for a reader, (..., head*out) for a writer.
        pair: A (p, in) and B (head*out, p); dW is ``B @ A`` for a reader, its transpose for a writer.
        writer: whether the residual stream is the output.
        scaling: factor of the update, applied in the p-dimensional space.

    Returns:
        (..., head*out) for a reader, (..., in) for a writer.
    """
    a, b = (factor.to(x.device, x.dtype) for factor in pair)
    first, second = (b.mT, a.mT) if writer else (a, b)
    return linear(linear(x, first) * scaling, second)


class Share:
    """A forward hook: adds the share of one site, while the adapter is active.

    An object and not a closure, so that it follows deepcopy and pickle. It holds no tensor: the
    parameters belong to the adapter, and nothing of one forward outlives it.
    """

    def __init__(self, adapter: Adapter, site: Site) -> None:
        self.adapter = adapter
        self.site = site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Torch's forward hook: the projection's output with the share added."""
        adapter = self.adapter
        if not adapter.active:
            return None
        x = dropout(args[0], adapter.dropout, adapter.training)
        share = low_rank(x, adapter.pair(self.site), self.site.writer, adapter.scaling)
        return output + share.to(output.dtype)


def dense_share(pair: Cut, site: Site) -> Tensor:
    """dW of one site in the shape in which its weight is stored."""
    dense = pair.B @ pair.A
    return dense if site.writer == site.transposed else dense.mT
