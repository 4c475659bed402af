"""Orders the parameters of a line whose bonds form a tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ._notation import Term


def leaves_first(
    terms: Sequence[Term], carriers: Mapping[str, Sequence[int]], bonds: Sequence[str], root: int
) -> list[tuple[int, str]]:
    """List all parameters except the root, leaves first; see `Legs.leaves_to_root`.

    Args:
        terms: the terms of the line.
        carriers: the positions of the terms with each leg.
        bonds: the legs that are summed over.
        root: the position of the root.
    """
    line = ", ".join(map(str, terms))
    order, queue = list[tuple[int, str]](), [root]
    met, crossed = set(queue), set[str]()
    while queue:
        near = queue.pop(0)
        for bond in terms[near].legs:
            ends = [k for k in carriers[bond] if k != near] if bond in bonds else []
            if bond in crossed or not ends:
                continue
            crossed.add(bond)
            if len(ends) > 1 or ends[0] in met:
                raise ValueError(
                    f"bond {bond!r} closes a loop or joins {len(ends) + 1} parameters; a start along "
                    "a tensor needs a tree, such as 'tucker', 'tt', 'lotr', 'lora' or 'lora_xs'; "
                    f"found\n    {line}"
                )
            met.add(ends[0])
            queue.append(ends[0])
            order.append((ends[0], bond))
    if len(met) < len(terms):
        raise ValueError(
            f"not every parameter is joined to the one that starts at zero, in\n    {line}"
        )
    return order[::-1]
