"""Contracts one large tensor with small ones again and again, and keeps the product that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ._einsum import Names, compile_constant
from ._pieces import Pieces, joined


class KeptProduct:
    """Contracts a large tensor with small ones; the last product with one of them is kept.

    Alternating least squares contracts the target with all parameters but one. The first product, of the
    target with one parameter, is nearly all the work, and the updates of several parameters have it in
    common (dimension trees: Phan, Tichavsky and Cichocki 2013). For CP of any number of modes two such
    products are made in a sweep, and not one for each mode.

    Args:
        tensor: the large tensor, which is not to change.
        legs: its legs.
    """

    def __init__(self, tensor: Tensor, legs: Names) -> None:
        self.large = Pieces((legs,), (tensor,))
        self._other: Tensor | None = None
        self._product = self.large

    def contract(self, rest: Pieces, output: Sequence[str]) -> Tensor:
        """Contract the large tensor with others to some legs.

        Args:
            rest: the other tensors; those of an earlier call are recognised as the same objects.
            output: the legs of the result.
        """
        sizes = (self.large.tensors[0].shape, *(tensor.shape for tensor in rest.tensors))
        products, best = _products(self.large.terms + rest.terms, sizes, tuple(output))
        for k, legs in enumerate(products):
            if rest.tensors[k] is self._other and self._product.terms == (legs,):
                return joined(self._product, rest.without(k)).contract(output)
        if best is None:
            return joined(self.large, rest).contract(output)
        legs = products[best]
        product = joined(self.large, rest.subset([best])).contract(legs)
        self._other, self._product = rest.tensors[best], Pieces((legs,), (product,))
        return joined(self._product, rest.without(best)).contract(output)


@compile_constant
def _products(
    terms: tuple[Names, ...], shapes: tuple[tuple[int, ...], ...], output: Names
) -> tuple[list[Names], int | None]:
    """List the legs of the product of the first tensor with each other one: those that the result or another
    tensor needs. The second result is the position of the smallest; None if the first tensor is smaller."""
    large, *rest = terms
    products = []
    for k, term in enumerate(rest):
        needed = {*output, *(leg for j, each in enumerate(rest) if j != k for leg in each)}
        products.append(tuple(leg for leg in dict.fromkeys(term + large) if leg in needed))
    sizes = {leg: size for pair in zip(terms, shapes) for leg, size in zip(*pair)}
    volumes = [math.prod(sizes[leg] for leg in legs) for legs in products]
    if not volumes or min(volumes) > math.prod(shapes[0]):
        return products, None
    return products, volumes.index(min(volumes))
