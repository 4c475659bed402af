"""Contracts tensors whose axes (legs) have names: the arithmetic of `dense` and `cut`, without modules.

A leg may stand on any number of tensors, as the bond of CP stands on all. A contraction goes pair by
pair; a leg is summed as soon as neither the output nor a tensor outside the pair needs it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from itertools import combinations
from string import ascii_letters
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from .._torch import as_constant, is_autocast, is_tracing, without_autocast
from ._notation import LegsError

#: How many multiplications take as long as reading or writing one number.
COST_OF_ONE_PASS = 100


Names = tuple[str, ...]


Path = tuple[tuple[int, int, str], ...]


Plan = TypeVar("Plan")


def compile_constant(function: Callable[..., Plan]) -> Callable[..., Plan]:
    """Cache a pure function of hashable arguments; torch.compile treats its results as constants."""
    cached = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def call(*args: object) -> Plan:
        return cached(*args)

    return as_constant(call)


@compile_constant
def contraction_path(
    terms: tuple[Names, ...], output: Names, sizes: tuple[tuple[str, int], ...]
) -> Path:
    """Find the order of pairwise contractions with the fewest multiplications and passes over memory.

    For up to six tensors, which covers every usual format, all orders are compared. For more, each step
    takes the cheapest pair.

    Returns:
        Steps ``(i, j, equation)``. Values are numbered: first the tensors, then the result of each step;
        a step contracts values i and j. A single tensor gives one step with ``i == j``.

    Raises:
        LegsError: more legs than einsum has letters.
    """
    size = dict(sizes)
    if len(size) > len(ascii_letters):
        raise LegsError(
            f"a contraction has at most {len(ascii_letters)} legs, one for each letter of einsum; "
            f"found {len(size)}. Join bonds between the same parameters to one"
        )
    if len(terms) == 1:
        return ((0, 0, equation_of((terms[0],), output)),)
    left, places, steps = terms, list(range(len(terms))), []
    for i, j in _order(terms, output, size)[1]:
        result = _joined(left, (i, j), output)
        steps.append((places[i], places[j], equation_of((left[i], left[j]), result)))
        left = _without(left, (i, j), result)
        places = [place for k, place in enumerate(places) if k not in (i, j)]
        places.append(len(terms) + len(steps) - 1)
    return tuple(steps)


def equation_of(terms: Sequence[Names], output: Names) -> str:
    """Write the contraction of one or two tensors for einsum.

    Args:
        terms: the legs of each tensor.
        output: the legs of the result.
    """
    legs = dict.fromkeys(leg for term in terms for leg in term)
    letters = dict(zip(legs, ascii_letters, strict=False))
    words = ["".join(letters[leg] for leg in term) for term in (*terms, output)]
    return f"{','.join(words[:-1])}->{words[-1]}"


def _order(
    terms: tuple[Names, ...], output: Names, size: Mapping[str, int]
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Return the cost and the pairs of the best order (for more than six tensors, of the greedy one)."""
    if len(terms) == 1:
        return 0, ()
    if len(terms) > 6:
        cost, pair = _cheapest_step(terms, output, size)
        left = _without(terms, pair, _joined(terms, pair, output))
        more, pairs = _order(left, output, size)
        return cost + more, (pair, *pairs)
    steps = []
    for pair in combinations(range(len(terms)), 2):
        one, other, result = terms[pair[0]], terms[pair[1]], _joined(terms, pair, output)
        moved = sum(math.prod(size[leg] for leg in term) for term in (one, other, result))
        cost = math.prod(size[leg] for leg in {*one, *other}) + COST_OF_ONE_PASS * moved
        steps.append((cost, pair, _without(terms, pair, result)))
    orders = []
    for cost, pair, left in steps:
        more, pairs = _order(left, output, size)
        orders.append((cost + more, (pair, *pairs)))
    return min(orders)


def _cheapest_step(
    terms: tuple[Names, ...], output: Names, size: Mapping[str, int]
) -> tuple[int, tuple[int, int]]:
    """Find the cheapest pair to contract; return its cost and the pair. Time is quadratic in the terms."""
    carriers = Counter(leg for term in terms for leg in term)
    carriers.update(output)
    volume = [math.prod(size[leg] for leg in term) for term in terms]
    # Legs that no other term carries are summed; a term carries each of its legs once.
    alone = [math.prod(size[leg] for leg in term if carriers[leg] == 1) for term in terms]
    legs = [frozenset(term) for term in terms]
    least, best = math.inf, (0, 1)
    for i, j in combinations(range(len(terms)), 2):
        product, gone = volume[i] * volume[j], alone[i] * alone[j]
        if not legs[i].isdisjoint(legs[j]):
            common = legs[i] & legs[j]
            product //= math.prod(size[leg] for leg in common)
            gone *= math.prod(size[leg] for leg in common if carriers[leg] == 2)
        cost = product + COST_OF_ONE_PASS * (volume[i] + volume[j] + product // gone)
        if cost < least:
            least, best = cost, (i, j)
    return int(least), best


def _without(terms: tuple[Names, ...], pair: tuple[int, int], result: Names) -> tuple[Names, ...]:
    """Return the terms after a step: without the pair, with the result at the end."""
    return (*(term for k, term in enumerate(terms) if k not in pair), result)


def _joined(terms: Sequence[Names], pair: tuple[int, int], output: Names) -> Names:
    """Return the legs of the product of two terms: those that the output or another term still needs."""
    if len(terms) == 2:
        return output
    rest = {leg for k, term in enumerate(terms) if k not in pair for leg in term}
    both = dict.fromkeys(terms[pair[0]] + terms[pair[1]])
    return tuple(leg for leg in both if leg in output or leg in rest)


def contract(
    terms: tuple[Names, ...], tensors: Sequence[Tensor], output: Names, sizes: Mapping[str, int]
) -> Tensor:
    """Contract tensors: sum over every leg that is not in ``output``, the axes of the result."""
    return contract_along(contraction_path(terms, output, tuple(sizes.items())), tensors)


def contract_along(path: Path, tensors: Sequence[Tensor]) -> Tensor:
    """Contract tensors along a path, in their own dtype, also under autocast."""
    device = tensors[0].device.type
    if is_autocast(device):
        with without_autocast(device):
            return contract_along(path, tensors)
    # In this order, because a fit asks thousands of times, and without gradients.
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors) or is_tracing():
        return _values(path, tensors)[-1]
    result: Tensor = _Contraction.apply(path, *tensors)
    return result


def _values(path: Path, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors, followed by the result of every step."""
    values = list(tensors)
    for left, right, equation in path:
        pair = [values[left]] if left == right else [values[left], values[right]]
        values.append(torch.einsum(equation, *pair))
    return values


class _Contraction(Function):
    """A contraction whose gradients are contractions again.

    For a step that sums over no leg, autograd would form a product as large as the step's result and
    then sum it; here each gradient is one contraction.
    """

    @staticmethod
    def forward(ctx: Any, path: Path, *tensors: Tensor) -> Tensor:
        ctx.path = path
        ctx.save_for_backward(*tensors)
        *ctx.values, result = _values(path, tensors)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        # If the gradient itself will be differentiated, its graph has to contain the steps.
        values = _values(ctx.path[:-1], tensors) if torch.is_grad_enabled() else ctx.values
        needed = list(ctx.needs_input_grad[1:])
        for left, right, _ in ctx.path:
            needed.append(needed[left] or needed[right])
        gradients: list[Tensor | None] = [None] * len(values) + [gradient]
        steps = list(enumerate(ctx.path, start=len(tensors)))
        for place, (left, right, equation) in reversed(steps):
            known = gradients[place]
            legs, result = equation.split("->")
            if left == right:
                gradients[left] = torch.einsum(f"{result}->{legs}", known)
                continue
            one, other = legs.split(",")
            if needed[left]:
                gradients[left] = torch.einsum(f"{result},{other}->{one}", known, values[right])
            if needed[right]:
                gradients[right] = torch.einsum(f"{result},{one}->{other}", known, values[left])
        return None, *gradients[: len(tensors)]
