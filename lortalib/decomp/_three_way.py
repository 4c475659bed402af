"""Divides a network in three: the wide sides that do not depend on a mode, and the middle that does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ._cut import OUT_MODES, Partition, Side, cheapest_cut, make_side
from ._einsum import Names, compile_constant
from ._tensor_network import TensorNetwork


class ThreeWayCut(NamedTuple):
    """Slices of a tensor as products of three maps, of which the middle one alone depends on a mode.

    With ``h = A x`` over (c, p), entry (head, out) of a slice's product with x is the sum over c, p and q
    of ``B[(c, q), out] middle[head, c, p, q] h[c, p]``. All three have the batch modes as leading axes.

    Attributes:
        A: (c * p, in).
        middle: (heads, c, p, q); c are the bonds that join all three, p and q those on one side alone.
        B: (c * q, out), with heads = 1 and out the whole (head, out) if B carries ``head``.
    """

    A: Tensor
    middle: Tensor
    B: Tensor


class ThreeWayPlan(NamedTuple):
    """A plan that says where a network is divided in three, and how each part is contracted.

    Attributes:
        in_side: the side of ``in``.
        middle: the parameters between the sides; None of the others carries the mode.
        out_side: the side of ``out``.
        heads: the size of ``head`` in the middle; 1 if the side of ``out`` carries it.
        common: the size of each bond that joins both sides, and whether the middle carries it.
        ranks: the products of the bonds that join the middle to one side alone, (p, q).
    """

    in_side: Side
    middle: Side
    out_side: Side
    heads: int
    common: tuple[tuple[int, bool], ...]
    ranks: tuple[int, int]

    def cut(self, tensors: Sequence[Tensor]) -> ThreeWayCut:
        """Contract the tensors of a network to its three maps.

        Args:
            tensors: the parameters in the order of the line, with the sizes that the plan was made for.
        """
        c, (p, q) = math.prod(size for size, _ in self.common), self.ranks
        carried = (size if here else 1 for size, here in self.common)
        middle = self.middle.contract(tensors, (self.heads, *carried, p, q))
        lead = middle.shape[: len(self.middle.batch_modes)]
        sizes = (size for size, _ in self.common)
        middle = middle.expand(*lead, self.heads, *sizes, p, q).reshape(*lead, self.heads, c, p, q)
        a = self.in_side.contract(tensors, (c * p, -1))
        return ThreeWayCut(a, middle, self.out_side.contract(tensors, (c * q, -1)))


def three_way_plan(network: TensorNetwork, mode: str, *batch_modes: str) -> ThreeWayPlan | None:
    """Plan a division of a network into two sides without a mode, and a middle that contains the mode.

    ``in`` is cut from the parameters that carry the mode, and these from ``out``, each where the product of
    the crossing bonds is smallest. What lies between the two cuts is the middle.

    Args:
        network: a network with no modes but ``in``, ``out``, ``head`` and ``batch_modes``.
        mode: the mode, one of ``batch_modes``.
        batch_modes: modes that become leading axes, in this order.

    Returns:
        The plan; None if one of the sides cannot be without the mode, if no parameter carries it, or if any
        mode is split. `TensorNetwork.cut_plan` then divides the network in two.

    Raises:
        LegsError: the network cannot be cut over these modes; see `TensorNetwork.cut`.

    Example:
        >>> import torch
        >>> from lortalib.decomp import Network
        >>> tensors = [torch.ones(8, 3), torch.ones(6, 3), torch.ones(100, 3)]
        >>> net = Network("in r, out r, task r", tensors, ["task", "in", "out"])
        >>> a, middle, b = three_way_plan(net, "task", "task").cut(net.tensors)
        >>> a.shape, middle.shape, b.shape
        (torch.Size([1, 3, 8]), torch.Size([100, 1, 3, 1, 1]), torch.Size([1, 3, 6]))
    """
    network.cut_plan(*batch_modes)  # raises where the network cannot be cut at all
    if network.modes != network.open_legs:
        return None  # the sides of a split mode can lie on both sides of a cut
    terms = tuple(term.legs for term in network.legs.terms)
    plan: ThreeWayPlan | None = _plan(terms, tuple(network.sizes.items()), mode, batch_modes)
    return plan


@compile_constant
def _plan(
    terms: tuple[Names, ...], sizes: tuple[tuple[str, int], ...], mode: str, batch_modes: Names
) -> ThreeWayPlan | None:
    size = dict(sizes)
    slices = tuple(leg for leg in batch_modes if leg != mode)
    near = _cut_off(terms, sizes, ("in",), (*OUT_MODES, mode), slices)
    if not near.in_side or not any(mode in term for term in terms):
        return None
    # The side of `head` is that where a position of `mode` makes fewer numbers for each input.
    tries = [(size.get("head", 1), ("out",), ("in", "head", mode)), (1, OUT_MODES, ("in", mode))]
    found = []
    for heads, own, rest in tries:
        far = _far_side(terms, sizes, near, (own, rest), slices)
        if far.in_side:
            found.append((heads * math.prod(size[leg] for leg in far.bonds), heads, far))
    if not found:
        return None
    _, heads, far = min(found, key=lambda each: each[0])
    middle = tuple(k for k in near.out_side if k not in far.in_side)
    carried = {leg for k in middle for leg in terms[k]}
    common = tuple(leg for leg in near.bonds if leg in far.bonds)
    p = tuple(leg for leg in near.bonds if leg not in common)
    q = tuple(leg for leg in far.bonds if leg not in common)
    head = ("head",) if "head" in carried else ()
    out = tuple(leg for leg in OUT_MODES if any(leg in terms[k] for k in far.in_side))

    leading = tuple((leg,) for leg in batch_modes)

    def side(parameters: tuple[int, ...], *legs: str) -> Side:
        return make_side(terms, sizes, parameters, leading, legs)

    return ThreeWayPlan(
        side(near.in_side, *common, *p, "in"),
        side(middle, *head, *(leg for leg in common if leg in carried), *p, *q),
        side(far.in_side, *common, *q, *out),
        heads,
        tuple((size[leg], leg in carried) for leg in common),
        (math.prod(size[leg] for leg in p), math.prod(size[leg] for leg in q)),
    )


def _far_side(
    terms: tuple[Names, ...],
    sizes: tuple[tuple[str, int], ...],
    near: Partition,
    modes: tuple[Names, Names],
    slices: Names,
) -> Partition:
    """Cut the side of ``out`` from the rest; the side of ``in`` counts as one contracted parameter."""
    # Terms keep their positions: the contracted side stands for its first, the others are empty.
    first, *others = near.in_side
    left = list(terms)
    left[first] = (*near.bonds, "in")
    for k in others:
        left[k] = ("in",)
    return _cut_off(tuple(left), sizes, modes[0], modes[1], slices)


def _cut_off(
    terms: tuple[Names, ...],
    sizes: tuple[tuple[str, int], ...],
    own: Names,
    rest: Names,
    slices: Names,
) -> Partition:
    """Cut the parameters with the legs ``own`` from those with ``rest``; no side if a parameter has both."""
    if any({*own} & {*term} and {*rest} & {*term} for term in terms):
        return Partition((), tuple(range(len(terms))), own)
    found: Partition = cheapest_cut(terms, sizes, rest, slices, own)
    return found
