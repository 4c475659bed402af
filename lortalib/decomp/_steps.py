"""Plans a contraction of tensors of known shapes down to single operations.

`torch.einsum` reads its equation and arranges its tensors anew at every call. For small tensors that takes
longer than the product, and a fit asks for the same contractions thousands of times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import dropwhile
from typing import NamedTuple, Union

import torch
from torch import Tensor

from .._torch import is_autocast, is_tracing
from ._einsum import Path


class Turn(NamedTuple):
    """How a tensor is arranged before or after a product; None where there is nothing to do.

    Attributes:
        summed: axes that are summed over.
        split: the shape then.
        order: the permutation of the axes then.
        merged: the shape in the end.
    """

    summed: tuple[int, ...] | None = None
    split: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    merged: tuple[int, ...] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Arrange a tensor."""
        if self.summed is not None:
            tensor = tensor.sum(self.summed)
        if self.split is not None:
            tensor = tensor.reshape(self.split)
        if self.order is not None:
            tensor = tensor.permute(self.order)
        return tensor if self.merged is None else tensor.reshape(self.merged)


Turns = tuple[Union[Turn, None], Union[Turn, None], Union[Turn, None]]


class Step(NamedTuple):
    """A product of two values, or the arrangement of one.

    Attributes:
        left: the position of the first among all values: the tensors, then the result of each step.
        right: the position of the second; the same for one value.
        turns: how the two and the product are arranged; None for as they are.
        has_matrices: whether the product is one of matrices; else it is entry by entry.
    """

    left: int
    right: int
    turns: Turns
    has_matrices: bool

    def run(self, values: Sequence[Tensor]) -> Tensor:
        """Compute the result."""
        left, right, (first, second, last), has_matrices = self
        one, other = values[left], values[right]
        if first is not None:
            one = first.of(one)
        if left == right:
            return one
        if second is not None:
            other = second.of(other)
        found = one @ other if has_matrices else one * other
        return found if last is None else last.of(found)


def steps_of(path: Path, shapes: tuple[tuple[int, ...], ...]) -> tuple[Step, ...]:
    """Plan the steps of a contraction.

    Args:
        path: their order, as `contraction_path` returns it.
        shapes: the shape of each tensor.
    """
    values, steps = list(shapes), list[Step]()
    for left, right, equation in path:
        inputs, _, output = equation.partition("->")
        one, _, other = inputs.partition(",")
        size = dict(zip(one + other, (*values[left], *values[right])))
        values.append(tuple(size[leg] for leg in output))
        if left == right:
            steps.append(Step(left, right, (_turn(one, output, size), None, None), False))
        else:
            steps.append(Step(left, right, *_product(one, other, output, size)))
    return tuple(steps)


def has_values_only(tensors: Sequence[Tensor]) -> bool:
    """Return True if nothing follows what is computed of tensors of one dtype: no gradients, autocast or
    tracing. Autocast leaves float64 as it is."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    first = tensors[0]
    is_kept = first.dtype == torch.float64 or not is_autocast(first.device.type)
    return is_kept and not is_tracing()


def run_steps(steps: Sequence[Step], tensors: Sequence[Tensor]) -> Tensor:
    """Contract tensors of the shapes that the steps were planned for."""
    values = list(tensors)
    for step in steps:
        values.append(step.run(values))
    return values[-1]


def _product(one: str, other: str, output: str, size: dict[str, int]) -> tuple[Turns, bool]:
    """Plan the product of two tensors, whose legs are letters; see `Step` for the results."""
    large = max(one, other, key=lambda legs: math.prod(size[leg] for leg in legs))
    inner = "".join(leg for leg in large if leg in one and leg in other and leg not in output)
    batch = "".join(leg for leg in output if leg in one and leg in other)
    rows = "".join(leg for leg in one if leg in output and leg not in other)
    columns = "".join(leg for leg in other if leg in output and leg not in one)
    # Products of matrices copy a tensor whose batch lies innermost in memory, products of entries do not.
    is_innermost = large[-1:] in [*batch] and not (rows and columns)
    if not inner or is_innermost or (batch and not rows and not columns):
        every = output + inner
        left, right = (_turn(legs, _broadcast(every, legs), size) for legs in (one, other))
        return (left, right, _turn(every, output, size)), False
    # Without a batch a vector may take the place of a matrix.
    first, second, third = (
        [legs for legs in groups if legs or batch]
        for groups in ((batch, rows, inner), (batch, inner, columns), (batch, rows, columns))
    )
    found = "".join(third)
    result = _turn(found, output, size)
    if any(len(legs) != 1 for legs in third):
        result = (result or Turn())._replace(split=tuple(size[leg] for leg in found))
    return (_turn(one, first, size), _turn(other, second, size), result), True


def _broadcast(every: str, legs: str) -> list[str]:
    """List the axes that a tensor with some legs has among all; the first ones that it lacks are left out."""
    return list(dropwhile("".__eq__, [leg if leg in legs else "" for leg in every]))


def _turn(legs: str, groups: Sequence[str], size: dict[str, int]) -> Turn | None:
    """Plan how a tensor gets one axis for each group of its legs, of size 1 for none; others are summed."""
    wanted = "".join(groups)
    kept = [leg for leg in legs if leg in wanted]
    order = tuple(kept.index(leg) for leg in wanted)
    merged = tuple(math.prod(size[leg] for leg in group) for group in groups)
    found = Turn(
        summed=tuple(axis for axis, leg in enumerate(legs) if leg not in wanted) or None,
        order=None if order == tuple(range(len(order))) else order,
        merged=None if all(len(group) == 1 for group in groups) else merged,
    )
    return None if found == Turn() else found
