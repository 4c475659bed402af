"""Plans a contraction of tensors of known shapes down to single operations.

`torch.einsum` reads its equation and arranges its tensors anew at every call. For small tensors that takes
longer than the product, and a fit asks for the same contractions thousands of times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import dropwhile
from typing import NamedTuple, Union

import torch
from torch import Tensor

from .._torch import is_autocast, is_tracing
from ._einsum import Path

#: Below so many entries, many matrices take longer to be called than to be multiplied: they are copied into
#: one, or multiplied by vectors entry by entry.
LEAST_MATRIX = 2048

#: The size of each leg.
Sizes = Mapping[str, int]


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
    # Results between stay as the product leaves them: which axis of the equation each of their axes is.
    axes = [tuple(range(len(shape))) for shape in shapes]
    for left, right, equation in path:
        inputs, _, output = equation.partition("->")
        one, _, other = inputs.partition(",")
        size = dict(zip(one + other, (*values[left], *values[right])))
        if left == right:
            return (Step(left, right, (_turn(one, output, size), None, None), False),)
        places = {
            left: "".join(one[axis] for axis in axes[left]),
            right: "".join(other[axis] for axis in axes[right]),
        }
        small, large = sorted(places, key=lambda k: _volume(places[k], size))
        is_last = len(steps) == len(path) - 1
        plan = _product(places[small], places[large], output, size, is_last)
        steps.append(Step(small, large, plan.turns, plan.has_matrices))
        values.append(tuple(size[leg] for leg in output))
        axes.append(tuple(output.index(leg) for leg in plan.legs))
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


class _Product(NamedTuple):
    """How two tensors are multiplied: as in `Step`, and the legs of the result."""

    turns: Turns
    has_matrices: bool
    legs: str


def _product(small: str, large: str, output: str, size: Sizes, is_last: bool) -> _Product:
    """Plan the product of two tensors, whose legs are letters.

    Args:
        small: the legs of the first tensor.
        large: the legs of the second, which is not smaller.
        output: the legs of the result.
        size: the size of every leg.
        is_last: whether the result has to have its legs in this order.
    """
    inner = "".join(leg for leg in large if leg in small and leg not in output)
    batch = "".join(leg for leg in output if leg in small and leg in large)
    rows = "".join(leg for leg in small if leg in output and leg not in large)
    columns = "".join(leg for leg in large if leg in output and leg not in small)
    is_short = _volume(inner + rows + columns, size) < LEAST_MATRIX
    # For each place of a batch, a matrix and a vector, or two vectors.
    is_narrow = batch and not (rows and columns) and (is_short or not (rows or columns))
    if not inner or is_narrow:
        every = output + inner
        left, right = (_turn(legs, _broadcast(every, legs), size) for legs in (small, large))
        return _Product((left, right, _turn(every, output, size)), False, output)
    # The small matrix stands first: then the entries of the large one are used in the order of memory.
    groups = ((batch, rows, inner), (batch, inner, columns), (batch, rows, columns))
    before, _, after = "".join(leg for leg in large if leg in inner + columns).partition(inner)
    if before and after and not batch and _volume(inner + after, size) >= LEAST_MATRIX:
        groups = (("", rows, inner), (before, inner, after), (before, rows, after))
    # Without a batch a vector may take the place of a matrix.
    first, second, third = ([legs for legs in group if legs or batch] for group in groups)
    found = "".join(third)
    result = _turn(found, output, size) if is_last else None
    if any(len(legs) != 1 for legs in third):
        result = (result or Turn())._replace(split=tuple(size[leg] for leg in found))
    turns = _turn(small, first, size), _turn(large, second, size), result
    return _Product(turns, True, output if is_last else found)


def _volume(legs: str, size: Sizes) -> int:
    return math.prod(size[leg] for leg in legs)


def _broadcast(every: str, legs: str) -> list[str]:
    """List the axes that a tensor with some legs has among all; the first ones that it lacks are left out."""
    return list(dropwhile("".__eq__, [leg if leg in legs else "" for leg in every]))


def _turn(legs: str, groups: Sequence[str], size: Sizes) -> Turn | None:
    """Plan how a tensor gets one axis for each group of its legs, of size 1 for none; others are summed."""
    wanted = "".join(groups)
    kept = [leg for leg in legs if leg in wanted]
    order = tuple(kept.index(leg) for leg in wanted)
    merged = tuple(_volume(group, size) for group in groups)
    found = Turn(
        summed=tuple(axis for axis, leg in enumerate(legs) if leg not in wanted) or None,
        order=None if order == tuple(range(len(order))) else order,
        merged=None if all(len(group) == 1 for group in groups) else merged,
    )
    return None if found == Turn() else found
