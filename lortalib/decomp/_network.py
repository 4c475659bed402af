"""Defines the tensor network that owns its parameters: a `torch.nn.Module`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ._hashed import Hash, make_hashes
from ._legs import Legs
from ._modes import Shape
from ._notation import name_of
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
            marked ``(tied)``, give the tensor of the term before it again; for one marked ``(of n)``, its
            vector of n numbers, the same for all that name it.
        modes: the modes, in the order of the axes of `dense`. One that is no leg of the line is the product
            of its factors, as ``in`` is of ``in.1 in.2``.
        sizes: sizes of legs that no tensor shows, since only hashed parameters carry them; others are
            checked against the tensors.

    Raises:
        LegsError: an ill-formed line, one that does not fit the modes, or sizes that disagree.
        ValueError: a tensor of a tied or hashed term that differs from the one that it shares.
        TypeError: parameters that are no torch tensors of one floating-point dtype.

    Example:
        >>> import torch
        >>> net = Network("in r, out r", [torch.ones(3, 2), torch.ones(4, 2)], ["in", "out"])
        >>> net.dense().shape, net.count()
        (torch.Size([3, 4]), 14)
    """

    _hashes: tuple[Hash, ...]

    def __init__(
        self,
        legs: Legs | str,
        tensors: Sequence[Tensor],
        modes: Sequence[str] | Shape,
        *,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        tensors, modes = tuple(tensors), tuple(modes)
        _check_tensors(tensors)
        legs = Legs.parse(legs) if isinstance(legs, str) else legs
        sizes = legs.sizes([tensor.shape for tensor in tensors], sizes)
        legs.check(modes)
        legs = legs.with_factors(sizes)
        self._describe(legs, sizes, modes)
        hashes = make_hashes(legs.terms, sizes, legs.line or str(legs))
        # Set first, since the names of attributes, these included, are taken.
        self.names, self._hashes = (), ()
        taken = {name for one in hashes for name in _index_names(one)}
        self.names = tuple(self._parameter_names(taken))
        self._hashes = hashes
        for position, (name, term) in enumerate(zip(self.names, legs.terms)):
            tensor, holder = tensors[position], legs.holders[position]
            if holder == position:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=not term.frozen))
            elif not _are_alike(tensor, tensors[holder]):
                raise ValueError(
                    f"({term}) has the numbers of ({legs.terms[holder]}), but was given other numbers, in"
                    f"\n    {legs}"
                )
        if self._hashes:
            self.place_index(tensors[self._hashes[0].positions[0]].device)

    def _parameter_names(self, taken: Collection[str] = ()) -> list[str]:
        names: dict[str, None] = {}
        last: dict[str, str] = {}  # the last name given to a parameter with the same legs
        found: list[str] = []
        for position, term in enumerate(self.legs.terms):
            if self.legs.holders[position] < position:
                found.append(found[self.legs.holders[position]])
                continue
            name = wanted = f"theta_{term.of}" if term.of else name_of(term)
            name = last.get(wanted, name)
            while name in names or name in taken or hasattr(self, name):
                name += "_"
            names[name] = None
            last[wanted] = name
            found.append(name)
        return found

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The parameters, one for each term in the order of the line: its own, or that of the term it is tied
        to, or the vector it is hashed from. A parameter of several terms is repeated."""
        return tuple(self._parameters[name] for name in self.names)  # type: ignore[misc]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are contracted, one for each term in the order of the line. Those of hashed terms
        are computed from their vector, all others are the parameters themselves."""
        return self.spread(self.stored)

    def spread(self, stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the tensors of the terms from parameters like these, with any common leading axes.

        Args:
            stored: one tensor for each term, as the attribute of this name.

        Returns:
            One tensor for each term, as `tensors`; the very same where a term is not hashed.
        """
        if not self._hashes:
            return tuple(stored)
        made: dict[int, Tensor] = {}
        for one in self._hashes:
            theta = stored[one.positions[0]]
            index, counts = self._index(one, theta.device)
            made |= zip(one.positions, one.spread(theta, index, counts))
        return tuple(made.get(owner, stored[k]) for k, owner in enumerate(self.legs.owners))

    def like(self, stored: Sequence[Tensor]) -> Network:
        """Make a network of the same line and sizes whose parameters are given tensors.

        Args:
            stored: one tensor for each term, as `stored`.

        Raises:
            LegsError, ValueError: tensors that do not fit the line.

        Example:
            >>> import torch
            >>> net = Network("in r, out r", [torch.ones(3, 2), torch.ones(4, 2)], ["in", "out"])
            >>> net.like([2 * tensor for tensor in net.stored]).dense().unique()
            tensor([8.], grad_fn=<Unique2Backward0>)
        """
        return Network(self.legs, stored, self.modes, sizes=self.sizes)

    # The index of a hash is a buffer, so that it moves with the parameters; it is drawn again from its seed
    # wherever there are parameters and no index, as after loading from the meta device.

    def place_index(self, device: torch.device) -> None:
        """Draw which number of its vector each entry of a hashed parameter is, in memory of a device.

        A network on the meta device has no index until it is used with numbers; this draws it before.

        Args:
            device: the device; the meta device gets placeholders.
        """
        for one in self._hashes:
            with torch.inference_mode(False):  # the buffers outlive the mode in which they are made
                if device.type == "meta":
                    sizes = sum(one.entries), one.size
                    drawn = [torch.empty(n, dtype=torch.long, device=device) for n in sizes]
                else:
                    drawn = [tensor.to(device) for tensor in one.draw()]
            for name, tensor in zip(_index_names(one), drawn):
                self.register_buffer(name, tensor, persistent=False)

    def _index(self, one: Hash, device: torch.device) -> tuple[Tensor, Tensor]:
        names = _index_names(one)
        if self.get_buffer(names[0]).is_meta and device.type != "meta":
            self.place_index(device)
        index, counts = (self.get_buffer(name).to(device) for name in names)
        return index, counts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Network:
        absent = any(self.get_buffer(_index_names(one)[0]).is_meta for one in self._hashes)
        super()._apply(fn, recurse)
        if absent:  # to_empty gives memory without numbers
            self.place_index(self.stored[self._hashes[0].positions[0]].device)
        return self

    def forward(self) -> Tensor:
        """Contract the network to the full tensor, as `dense` does."""
        return self.dense()

    __repr__ = TensorNetwork.__repr__


def _check_tensors(tensors: Sequence[object]) -> None:
    """Refuse parameters that are no tensors of real numbers of one dtype."""
    kinds = [t.dtype if isinstance(t, Tensor) else type(t).__name__ for t in tensors]
    for kind in kinds:
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point or kind != kinds[0]:
            raise TypeError(
                f"the parameters are torch tensors of one floating-point dtype; found {kinds}"
            )


def _index_names(one: Hash) -> tuple[str, str]:
    """Name the buffers of a hash: its index, and its counts."""
    return f"index_of_{one.vector}", f"counts_of_{one.vector}"


def _are_alike(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors are the same object or have equal values; meta tensors count as equal."""
    return one is other or one.is_meta or other.is_meta or torch.equal(one, other)
