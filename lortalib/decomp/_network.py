"""Defines the tensor network that owns its parameters: a `torch.nn.Module`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._legs import Legs
from ._modes import Shape
from ._tensor_network import TensorNetwork


class Network(TensorNetwork, nn.Module):
    """A tensor stored as a network of small parameters whose axes (legs) have names.

    A leg is either a mode of the tensor or a bond, which is summed over. `dense`, `select` and `cut`
    read the line of legs and work for any format.

    Laws (property-tested over every registered format):

    * ``net.select(**i).dense()`` is ``net.dense()`` indexed at ``i``;
    * for the pair of `cut`, ``B @ A`` is the dense slice, and p is the product of the cut bonds' sizes;
    * gradients through `cut` and through `dense` agree.

    Args:
        legs: a line of legs, for instance ``"in r, out r, layer r"``, or one already parsed.
        tensors: one tensor for each term of the line, with an axis for each leg. They become
            `torch.nn.Parameter` objects, trainable unless the line marks them ``(frozen)``. For a term
            marked ``(tied)``, give the tensor of the term before it again.
        modes: the modes, in the order of the axes of `dense`.

    Raises:
        LegsError: an ill-formed line, one that does not fit the modes, or sizes that disagree.
        ValueError: a tensor of a tied term that differs from its parameter.

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
        self.names = ()  # set first: the names of attributes, this one included, are taken
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
        last: dict[str, str] = {}  # the last name given to a parameter with the same legs
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
        """The parameters, one for each term in the order of the line; a tied parameter is repeated."""
        return tuple(self._parameters[name] for name in self.names)  # type: ignore[misc]

    def forward(self) -> Tensor:
        """Contract the network to the full tensor, as `dense` does."""
        return self.dense()

    __repr__ = TensorNetwork.__repr__


def _are_alike(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors are the same object or have equal values; meta tensors count as equal."""
    return one is other or one.is_meta or other.is_meta or torch.equal(one, other)
