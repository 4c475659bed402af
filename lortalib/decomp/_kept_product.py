"""Contracts one large tensor with small ones again and again, and keeps the product that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ._einsum import Names
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
        products = [self._legs(rest, k, output) for k in range(len(rest.terms))]
        for k, legs in enumerate(products):
            if rest.tensors[k] is self._other and self._product.terms == (legs,):
                return joined(self._product, rest.without(k)).contract(output)
        sizes = rest.sizes | self.large.sizes
        volumes = [math.prod(sizes[leg] for leg in legs) for legs in products]
        k = min(range(len(volumes)), key=volumes.__getitem__, default=-1)
        if k < 0 or volumes[k] > self.large.tensors[0].numel():
            return joined(self.large, rest).contract(output)
        product = joined(self.large, rest.subset([k])).contract(products[k])
        self._other, self._product = rest.tensors[k], Pieces((products[k],), (product,))
        return joined(self._product, rest.without(k)).contract(output)

    def _legs(self, rest: Pieces, k: int, output: Sequence[str]) -> Names:
        """List the legs of the product with tensor k: those that the result or another tensor needs."""
        needed = {*output, *(leg for j, term in enumerate(rest.terms) if j != k for leg in term)}
        both = dict.fromkeys(self.large.terms[0] + rest.terms[k])
        return tuple(leg for leg in both if leg in needed)
