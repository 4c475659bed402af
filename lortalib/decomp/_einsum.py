"""Contracts tensors whose axes (legs) have names: the arithmetic of `dense` and `cut`, without modules.

A leg may stand on any number of tensors, as the bond of CP stands on all. A contraction goes pair by
pair; a leg is summed as soon as neither the output nor a tensor outside the pair needs it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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

#: Up to so many tensors, all orders of a contraction are compared.
MOST_COMPARED = 8


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

    For up to eight tensors, which covers every usual format, all orders are compared. Of more, the cheapest
    pair is contracted first, until eight are left.

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

    def contract_pair(i: int, j: int) -> None:
        nonlocal left, places
        result = _joined(left, (i, j), output)
        steps.append((places[i], places[j], equation_of((left[i], left[j]), result)))
        keep = [k for k in range(len(left)) if k not in (i, j)]
        left = (*(left[k] for k in keep), result)
        places = [*(places[k] for k in keep), len(terms) + len(steps) - 1]

    while len(left) > MOST_COMPARED:
        contract_pair(*_cheapest_pair(left, output, size))
    for i, j in _best_pairs(left, output, size):
        contract_pair(i, j)
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


def _best_pairs(
    terms: tuple[Names, ...], output: Names, size: Mapping[str, int]
) -> list[tuple[int, int]]:
    """Find the order with the least cost, from the best ways to contract each set of the terms.

    A set is a number whose binary digits say which terms it has, so its subsets are smaller numbers.

    Returns:
        Pairs of positions in the list of terms, which loses both of a pair and gets the result at its end.
    """
    whole, number = (1 << len(terms)) - 1, range(len(terms))
    legs, best = dict[int, frozenset[str]](), dict[int, tuple[int, int]]()  # cost, and one half
    for group in range(1, whole + 1):
        inside = {leg for k in number if group >> k & 1 for leg in terms[k]}
        needed = {*output, *(leg for k in number if not group >> k & 1 for leg in terms[k])}
        is_one = group.bit_count() == 1
        legs[group], best[group] = frozenset(inside if is_one else inside & needed), (0, 0)
        half, costs = (group - 1) & group, []
        while half > group ^ half:  # the half with the last term, so that each division is met once
            other = group ^ half
            moved = sum(_volume(legs[each], size) for each in (half, other, group))
            cost = _volume(legs[half] | legs[other], size) + COST_OF_ONE_PASS * moved
            costs.append((cost + best[half][0] + best[other][0], half))
            half = (half - 1) & group
        if costs:
            best[group] = min(costs)
    groups, pairs = [1 << k for k in number], list[tuple[int, int]]()

    def contract_group(group: int) -> None:
        half = best[group][1]
        if not half:
            return
        for each in (group ^ half, half):
            contract_group(each)
        i, j = sorted((groups.index(group ^ half), groups.index(half)))
        pairs.append((i, j))
        groups[:] = [each for k, each in enumerate(groups) if k not in (i, j)] + [group]

    contract_group(whole)
    return pairs


def _volume(legs: Iterable[str], size: Mapping[str, int]) -> int:
    return math.prod(size[leg] for leg in legs)


def _cheapest_pair(
    terms: tuple[Names, ...], output: Names, size: Mapping[str, int]
) -> tuple[int, int]:
    """Find the cheapest pair to contract. Time is quadratic in the terms."""
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
    return best


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
