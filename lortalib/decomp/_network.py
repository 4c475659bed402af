"""The network that owns its parameters, as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._legs import Legs
from ._modes import Shape
from ._tensor_network import TensorNetwork


class Network(TensorNetwork, nn.Module):
    """A tensor stored as a network of small parameters whose axes (legs) have names.

    A leg is a mode of the tensor or a bond, which is summed over. All else follows from the line
    of legs: `dense`, `select` and `cut` are written once, for any format.

    Laws (property-tested over every registered format):

    * ``net.select(**i).dense()`` is ``net.dense()`` indexed at ``i``;
    * ``B @ A`` of `cut` is the dense slice, and p is the product of the sizes of the cut bonds;
    * gradients through `cut` and through `dense` agree.

    Args:
        legs: a line of legs, for instance ``"in r, out r, layer r"``, or one already parsed.
        tensors: one tensor for each term of the line; its axes are its legs. They become
            `torch.nn.Parameter` objects, trainable unless the line marks them ``(frozen)``. The tensor
            of a term marked ``(tied)`` has to be that of the term before it.
        modes: the modes, in the order of the axes of `dense`.

    Raises:
        LegsError: the line is ill-formed, does not fit the modes, or the sizes disagree.
        ValueError: a tied term was given other numbers than its parameter.

    Example:
        >>> import torch
        >>> net = Network("in r, out r", [torch.ones(3, 2), torch.ones(4, 2)], ["in", "out"])
        >>> net.dense().shape, net.count()
        (torch.Size([3, 4]), 14)
    """

    def __init__(
        self, legs: Legs | str, tensors: Sequence[Tensor], modes: Sequence[str] | Shape
    ) -> None:
        super().__init__()
        tensors, modes = tuple(tensors), tuple(modes)
        legs = Legs.parse(legs) if isinstance(legs, str) else legs
        sizes = legs.sizes([tensor.shape for tensor in tensors])
        legs.check(modes)
        self._describe(legs, sizes, modes)
        self.names = ()  # the names of attributes, this one among them, are taken
        self.names = tuple(self._parameter_names())
        for name, term, tensor, owner in zip(self.names, legs.terms, tensors, legs.owners):
            if not term.tied:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=not term.frozen))
            elif not _are_alike(tensor, tensors[owner]):
                raise ValueError(
                    f"({term}) is tied to ({legs.terms[owner]}), but was given other numbers, in\n    {legs}"
                )

    def _parameter_names(self) -> list[str]:
        names: dict[str, None] = {}
        last: dict[str, str] = {}  # where the last parameter of these legs ended its search
        found: list[str] = []
        for term in self.legs.terms:
            if term.tied:
                found.append(found[-1])
                continue
            name = wanted = "_".join(term.legs)
            name = last.get(wanted, name)
            while name in names or hasattr(self, name):
                name += "_"
            names[name] = None
            last[wanted] = name
            found.append(name)
        return found

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters, in the order of the line; a tied one once for each of its terms."""
        return tuple(self._parameters[name] for name in self.names)  # type: ignore[misc]

    def forward(self) -> Tensor:
        """Contract the network to the full tensor, as `dense` does."""
        return self.dense()

    __repr__ = TensorNetwork.__repr__


def _are_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or hold the same numbers as far as they have any."""
    return one is other or one.is_meta or other.is_meta or torch.equal(one, other)
