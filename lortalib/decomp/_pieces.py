"""Collects the tensors of several networks, with named legs, for one contraction."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from ._einsum import Names, Path, compile_constant, contract_along, contraction_path
from ._steps import Step, has_values_only, run_steps, steps_of
from ._tensor_network import TensorNetwork


class Pieces(NamedTuple):
    """Tensors and the legs of each; legs with the same name are the same leg.

    Attributes:
        terms: the legs of each tensor.
        tensors: the tensors, in the same order.
    """

    terms: tuple[Names, ...]
    tensors: tuple[Tensor, ...]

    def renamed(self, mark: str, keep: Collection[str]) -> Pieces:
        """Append a mark to the name of every leg that is not in ``keep``."""
        return Pieces(_renamed(self.terms, mark, tuple(keep)), self.tensors)

    def wide(self) -> Pieces:
        """Take the values in float64, without gradients."""
        return Pieces(self.terms, tuple(tensor.detach().double() for tensor in self.tensors))

    def without(self, position: int) -> Pieces:
        """Leave out one tensor."""
        (terms, tensors), behind = self, position + 1
        return Pieces(terms[:position] + terms[behind:], tensors[:position] + tensors[behind:])

    def subset(self, positions: Iterable[int]) -> Pieces:
        """Keep the tensors at some positions."""
        chosen = tuple(positions)
        return Pieces(tuple(self.terms[k] for k in chosen), tuple(self.tensors[k] for k in chosen))

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every leg."""
        return {
            leg: size
            for term, tensor in zip(self.terms, self.tensors)
            for leg, size in zip(term, tensor.shape)
        }

    def contract(self, output: Sequence[str]) -> Tensor:
        """Sum over every leg that is not in ``output``, the axes of the result."""
        shapes = tuple([tensor.shape for tensor in self.tensors])
        plan = self.terms, tuple(output), shapes
        if has_values_only(self.tensors):
            return run_steps(_steps(*plan), self.tensors)
        return contract_along(_path(*plan), self.tensors)


@compile_constant
def _renamed(terms: tuple[Names, ...], mark: str, keep: Names) -> tuple[Names, ...]:
    return tuple(tuple(leg if leg in keep else leg + mark for leg in term) for term in terms)


@compile_constant
def _path(terms: tuple[Names, ...], output: Names, shapes: tuple[tuple[int, ...], ...]) -> Path:
    """Plan a contraction; a fit asks thousands of times, so all of it is behind the cache."""
    sizes = {leg: size for pair in zip(terms, shapes) for leg, size in zip(*pair)}
    path: Path = contraction_path(terms, output, tuple(sizes.items()))
    return path


@compile_constant
def _steps(
    terms: tuple[Names, ...], output: Names, shapes: tuple[tuple[int, ...], ...]
) -> tuple[Step, ...]:
    return steps_of(_path(terms, output, shapes), shapes)


def pieces_of(net: TensorNetwork) -> Pieces:
    """Collect the tensors of a network; a tied parameter stands once for each of its terms."""
    return Pieces(tuple(term.legs for term in net.legs.terms), tuple(net.tensors))


def joined(*several: Pieces) -> Pieces:
    """Put the tensors of several collections into one."""
    terms, tensors = several[0]
    for pieces in several[1:]:
        terms, tensors = terms + pieces.terms, tensors + pieces.tensors
    return Pieces(terms, tensors)


def position_of(net: TensorNetwork, parameter: str | int) -> int:
    """Find the position of a parameter, which is given by its name or its position in the line.

    Raises:
        KeyError: a name that the network does not have, or a position outside the line.
    """
    if isinstance(parameter, str) and parameter in net.names:
        return net.names.index(parameter)
    if isinstance(parameter, int) and -len(net.names) <= parameter < len(net.names):
        return parameter % len(net.names)
    raise KeyError(
        f"no parameter {parameter!r}: the parameters of this network are {', '.join(net.names)}, "
        f"at the positions 0 to {len(net.names) - 1}"
    )
