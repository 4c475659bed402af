"""Finds the minimum cut of a hypergraph by maximum flow, in exact integers.

The library divides a network where the product of the crossing bonds is smallest. Products are
compared by their logarithms, rounded so finely that their order never changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, localcontext
from math import gcd, prod

#: The two nodes that a cut separates.
SOURCE, SINK = 0, 1


def exact_logarithms(numbers: Sequence[int]) -> dict[int, int]:
    """Give each number an integer, so that sums of the integers compare exactly as products do.

    Each number is written as a product of powers of numbers without a common divisor. Products are
    equal only if their exponents are, so equal products get equal sums. The logarithms of unequal
    products up to P differ by at least 1/P, which sets the number of digits.

    Args:
        numbers: integers from 1; a product contains each at most as often as this list does.

    Example:
        >>> log = exact_logarithms([6, 2, 3, 7])
        >>> log[2] + log[3] == log[6] < log[7]
        True
    """
    base = _without_common_divisors(numbers)
    bits = prod(numbers).bit_length()
    digits = bits * 31 // 100 + len(str(bits)) + 3  # log10(2) is less than 0.31
    weights = {}
    with localcontext() as context:
        context.prec = digits + len(str(bits)) + 3
        for factor in base:
            weights[factor] = int(Decimal(factor).ln().scaleb(digits))
    found = {}
    for number in set(numbers):
        total, left = 0, number
        for factor in base:
            while left % factor == 0:
                total, left = total + weights[factor], left // factor
        found[number] = total
    return found


def _without_common_divisors(numbers: Iterable[int]) -> list[int]:
    """Find numbers above 1, no two with a common divisor, whose powers multiply to each given number."""
    base: list[int] = []
    waiting = [number for number in set(numbers) if number > 1]
    while waiting:
        number = waiting.pop()
        for place, other in enumerate(base):
            common = gcd(number, other)
            if common > 1:
                del base[place]
                parts = (common, number // common, other // common)
                waiting += [part for part in parts if part > 1]
                break
        else:
            base.append(number)
    return base


def source_side(
    edges: Sequence[tuple[frozenset[int], int]], to_sink: Mapping[int, int]
) -> set[int]:
    """Divide the nodes of a hypergraph at least cost, with `SOURCE` and `SINK` on different sides.

    Among divisions of equal cost this takes the one with the smallest side of the source.

    Args:
        edges: sets of nodes, each with the cost of nodes on both sides.
        to_sink: the cost of each node if it is on the side of the source.

    Returns:
        The nodes on the side of the source.

    Example:
        >>> sorted(source_side([(frozenset({SOURCE, 2}), 5), (frozenset({2, 3, SINK}), 3)], {2: 1, 3: 1}))
        [0, 2]
    """
    ample = 1 + sum(cost for _, cost in edges) + sum(to_sink.values())
    room: dict[int, dict[int, int]] = {SOURCE: {}, SINK: {}}

    def connect(start: int, end: int, forth: int, back: int = 0) -> None:
        room.setdefault(start, {})[end] = room.setdefault(start, {}).get(end, 0) + forth
        room.setdefault(end, {})[start] = room.setdefault(end, {}).get(start, 0) + back

    helper = -1  # extra nodes: two for each edge that joins more than two nodes
    for nodes, cost in edges:
        if len(nodes) == 2:
            one, other = nodes
            connect(one, other, cost, cost)
        elif len(nodes) > 2:
            connect(helper, helper - 1, cost)
            for node in nodes:
                connect(node, helper, ample)
                connect(helper - 1, node, ample)
            helper -= 2
    for node, cost in to_sink.items():
        connect(node, SINK, cost)
    while True:
        reached = _reached(room)
        if SINK not in reached:
            return {node for node in reached if node >= 0}
        steps, end = [], SINK
        while end != SOURCE:
            steps.append((reached[end], end))
            end = reached[end]
        flow = min(room[start][end] for start, end in steps)
        for start, end in steps:
            room[start][end] -= flow
            room[end][start] += flow


def _reached(room: Mapping[int, Mapping[int, int]]) -> dict[int, int]:
    """Search from the source along edges with spare capacity; return each node reached with its
    predecessor. The search ends at the sink."""
    reached = {SOURCE: SOURCE}
    queue = [SOURCE]
    for node in queue:
        for end, left in room[node].items():
            if left and end not in reached:
                reached[end] = node
                if end == SINK:
                    return reached
                queue.append(end)
    return reached
