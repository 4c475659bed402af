"""Carries the state of an optimiser over to parameters of other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..decomp import RankChange

#: The names that optimisers of torch give to averages of gradients: Adam and its relatives, SGD.
_GRADIENTS = ("exp_avg", "momentum_buffer")
#: And to averages, maxima or sums of their squares: Adam, AMSGrad, RMSprop, Adagrad.
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def carried_over(
    state: Mapping[str, Any], changes: Sequence[RankChange], position: int
) -> dict[str, Any]:
    """Carry the state of one parameter over.

    Args:
        state: what the optimiser has for the parameter.
        changes: the changes of rank, one after the other.
        position: the position of the parameter in the line.

    Returns:
        The state for the new parameter.

    Raises:
        ValueError: a tensor of which it is not known how it follows a change of coordinates.
    """
    found = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim:
            if name not in (*_GRADIENTS, *_SQUARES):
                raise ValueError(
                    f"the optimiser keeps {name!r}, and it is not known how that follows a change of rank. "
                    f"Averages of gradients ({', '.join(_GRADIENTS)}) and of their squares "
                    f"({', '.join(_SQUARES)}) are: use AdamW, Adam, SGD, RMSprop "
                    "without centered=True, or Adagrad of torch"
                )
            for change in changes:
                follow = change.gradient if name in _GRADIENTS else change.square
                value = follow(position, value)
        found[name] = value
    return found
