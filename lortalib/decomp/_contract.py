"""Contraction of named tensors: the arithmetic beneath dense and cut, without any module.

A tensor here is a pair (legs, torch tensor). A leg may stand on any number of tensors; it is summed
once nothing outside the pair being contracted needs it, which covers the bond of CP, shared by all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from itertools import combinations, product
from string import ascii_letters
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

#: Multiplications that take as long as reading or writing one number of a step.
COST_OF_ONE_PASS = 100

Names = tuple[str, ...]
Path = tuple[tuple[int, int, str], ...]
Plan = TypeVar("Plan")


def compile_constant(function: Callable[..., Plan]) -> Callable[..., Plan]:
    """Cache a pure function of hashable arguments; torch.compile takes its result as a constant."""
    cached = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def call(*args: object) -> Plan:
        return cached(*args)

    return torch.compiler.assume_constant_result(call)  # type: ignore[no-any-return]


@compile_constant
def contraction_path(
    terms: tuple[Names, ...], output: Names, sizes: tuple[tuple[str, int], ...]
) -> Path:
    """Pairwise order of a contraction: the one that costs least in multiplications and passes.

    Up to six tensors, which covers every usual format, all orders are compared; beyond that each
    step takes the pair that costs least.

    Returns:
        Steps ``(i, j, equation)``: the product of values i and j is the next value; the first
        values are the tensors. A single tensor gives one step with ``i == j``.
    """
    size = dict(sizes)
    letters = dict(zip(size, ascii_letters, strict=False))

    def word(legs: Names) -> str:
        return "".join(letters[leg] for leg in legs)

    if len(terms) == 1:
        return ((0, 0, f"{word(terms[0])}->{word(output)}"),)
    left, places, steps = terms, list(range(len(terms))), []
    for i, j in _order(terms, output, size)[1]:
        result = _joined(left, (i, j), output)
        steps.append((places[i], places[j], f"{word(left[i])},{word(left[j])}->{word(result)}"))
        left = _without(left, (i, j), result)
        places = [place for k, place in enumerate(places) if k not in (i, j)]
        places.append(len(terms) + len(steps) - 1)
    return tuple(steps)


def _order(
    terms: tuple[Names, ...], output: Names, size: Mapping[str, int]
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Cost and pairs of the best order (of the greedy one for more than six tensors)."""
    if len(terms) == 1:
        return 0, ()
    steps = []
    for pair in combinations(range(len(terms)), 2):
        one, other, result = terms[pair[0]], terms[pair[1]], _joined(terms, pair, output)
        moved = sum(math.prod(size[leg] for leg in term) for term in (one, other, result))
        cost = math.prod(size[leg] for leg in {*one, *other}) + COST_OF_ONE_PASS * moved
        steps.append((cost, pair, _without(terms, pair, result)))
    if len(terms) > 6:
        steps = [min(steps)]
    orders = []
    for cost, pair, left in steps:
        more, pairs = _order(left, output, size)
        orders.append((cost + more, (pair, *pairs)))
    return min(orders)


def _without(terms: tuple[Names, ...], pair: tuple[int, int], result: Names) -> tuple[Names, ...]:
    """The list after a step: the pair is gone, the result at the end."""
    return (*(term for k, term in enumerate(terms) if k not in pair), result)


def _joined(terms: Sequence[Names], pair: tuple[int, int], output: Names) -> Names:
    """The legs of the product of two terms: those that the output or another term still needs."""
    if len(terms) == 2:
        return output
    rest = {leg for k, term in enumerate(terms) if k not in pair for leg in term}
    both = dict.fromkeys(terms[pair[0]] + terms[pair[1]])
    return tuple(leg for leg in both if leg in output or leg in rest)


def contract(
    terms: tuple[Names, ...], tensors: Sequence[Tensor], output: Names, sizes: Mapping[str, int]
) -> Tensor:
    """Sum over every leg that is not in ``output``; the result's axes are those of ``output``."""
    return contract_along(contraction_path(terms, output, tuple(sizes.items())), tensors)


def contract_along(path: Path, tensors: Sequence[Tensor]) -> Tensor:
    """The contraction of tensors along a path, in their own dtype, also under autocast."""
    device = tensors[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with without_autocast(device):
            return contract_along(path, tensors)
    if is_tracing() or not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return _values(path, tensors)[-1]
    result: Tensor = _Contraction.apply(path, *tensors)
    return result


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Without autocast, where there is one: results have the dtype of the parameters."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def is_tracing() -> bool:
    """Whether only plain operations can be followed: in compiled, traced, transformed functions, and
    with fake tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def _values(path: Path, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors and, behind them, the result of every step."""
    values = list(tensors)
    for left, right, equation in path:
        pair = [values[left]] if left == right else [values[left], values[right]]
        values.append(torch.einsum(equation, *pair))
    return values


class _Contraction(Function):
    """A contraction whose gradients are contractions again.

    Autograd would go back through a step that sums nothing by a product as large as its result and
    a sum over it; here each gradient is one contraction.
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
        # Where the gradient itself is to be differentiated, the steps have to be in its graph.
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


class Partition(NamedTuple):
    """Two sides of a network and the bonds that cross between them."""

    in_side: tuple[int, ...]
    out_side: tuple[int, ...]
    bonds: Names


@compile_constant
def cheapest_cut(
    terms: tuple[Names, ...],
    sizes: tuple[tuple[str, int], ...],
    out_modes: Names,
    batch_modes: Names,
) -> Partition:
    """Split the parameters so that ``in`` lies on one side and ``out_modes`` on the other.

    The modes ``batch_modes`` are on both sides where both carry them: each of their values is cut alike.
    Of all such splits the one with the smallest product of crossing bonds; among equals the one with
    the fewest parameters beside ``in``. A network has few parameters, so all splits are tried.
    A parameter that carries ``in`` and a far mode cannot be split: then ``in_side`` is empty.
    """
    size = dict(sizes)
    pinned: list[int | None] = []
    for term in terms:
        out_side = any(mode in term for mode in out_modes)
        if "in" in term and out_side:
            # No bond separates the two sides: everything is far, and `in` itself is what crosses.
            return Partition((), tuple(range(len(terms))), ("in",))
        pinned.append(0 if "in" in term else 1 if out_side else None)
    free = [position for position, side in enumerate(pinned) if side is None]
    best: tuple[tuple[int, int], Partition] | None = None
    for choice in product((0, 1), repeat=len(free)):
        side = {**dict(enumerate(pinned)), **dict(zip(free, choice))}
        in_side = tuple(k for k in side if side[k] == 0)
        rest = tuple(k for k in side if side[k] == 1)
        beyond = {leg for k in rest for leg in terms[k]}
        crossing = (
            leg for k in in_side for leg in terms[k] if leg in beyond and leg not in batch_modes
        )
        bonds = tuple(dict.fromkeys(crossing))
        cost = (math.prod(size[bond] for bond in bonds), len(in_side))
        if best is None or cost < best[0]:
            best = cost, Partition(in_side, rest, bonds)
    assert best is not None
    return best[1]


class Side(NamedTuple):
    """One side of a divided network, ready to be contracted.

    Attributes:
        parameters: positions of its parameters.
        path: their contraction.
        over: for each leading axis of the result whether a parameter carries it.
    """

    parameters: tuple[int, ...]
    path: Path
    batch_modes: tuple[bool, ...]

    def contract(self, tensors: Sequence[Tensor], tail: tuple[int, int]) -> Tensor:
        """(*over, *tail), with size 1 where nothing carries an axis."""
        found = contract_along(self.path, [tensors[k] for k in self.parameters])
        lead = iter(found.shape)
        return found.reshape(*(next(lead) if carried else 1 for carried in self.batch_modes), *tail)


class CutPlan(NamedTuple):
    """A network divided at its cheapest cut.

    Attributes:
        partition: which parameters are on which side.
        rank: product of the sizes of the bonds that cross.
        near: the side of ``in``; nothing if ``in`` itself crosses.
        far: the other side.
    """

    partition: Partition
    rank: int
    in_side: Side | None
    out_side: Side


@compile_constant
def make_cut_plan(
    terms: tuple[Names, ...],
    sizes: tuple[tuple[str, int], ...],
    out_modes: Names,
    batch_modes: Names,
) -> CutPlan:
    """The division of `cheapest_cut`, with the order of the contractions on either side."""
    partition = cheapest_cut(terms, sizes, out_modes, batch_modes)
    size = dict(sizes)

    def side(positions: tuple[int, ...], rows: Names) -> Side:
        own = tuple(terms[k] for k in positions)
        carried = {leg for term in own for leg in term}
        lead = tuple(mode for mode in batch_modes if mode in carried)
        path = contraction_path(own, (*lead, *rows), sizes)
        return Side(positions, path, tuple(mode in carried for mode in batch_modes))

    in_side = side(partition.in_side, (*partition.bonds, "in")) if partition.in_side else None
    # The bonds lead in memory: products with B then run along rows of head*out.
    out_side = side(partition.out_side, (*partition.bonds, *out_modes))
    return CutPlan(partition, math.prod(size[bond] for bond in partition.bonds), in_side, out_side)
