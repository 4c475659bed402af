"""Divides tensors by powers of two, so that squares of huge or tiny entries are numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def of_size_one(tensors: Iterable[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Divide tensors in float64 each by a power of two near its largest entry.

    Args:
        tensors: the tensors; gradients flow through the division.

    Returns:
        The tensors, and the exponent of the power that their product was divided by.
    """
    found: list[Tensor] = []
    exponents: list[Tensor] = []
    for tensor in tensors:
        peak = tensor.detach().abs().amax()
        is_number = (peak > 0) & peak.isfinite()
        exponents.append(torch.where(is_number, peak, 1.0).log2().floor())
        found.append(times_power(tensor, -exponents[-1]))
    return found, torch.stack(exponents).sum()


def times_power(tensor: Tensor, exponent: Tensor) -> Tensor:
    """Multiply a tensor by a power of two, also by one that is no number itself.

    Args:
        tensor: the tensor.
        exponent: the exponent, a scalar.
    """
    half = (exponent / 2).floor()
    return tensor * half.exp2() * (exponent - half).exp2()
