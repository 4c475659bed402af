"""Holds the tensors that the rows of a batch gathered from a bank, for the hooks of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..._torch import is_tracing
from ...decomp import Legs, NetworkView, TensorNetwork, Term
from .._forward import ForwardScope, Pair, PairSource, Slot
from .._group import Group


class BatchTensors:
    """The tensors that the rows of one context gathered, and the low-rank pairs made from them.

    Args:
        tensors: a mapping from the name of each group to its tensors, each with a leading axis of rows.
        size: the number of rows.
    """

    def __init__(self, tensors: Mapping[str, Sequence[Tensor]], size: int) -> None:
        self.size = size
        self._tensors = tensors
        self._batch: tuple[object, int | None] = None, None
        self._contracted: dict[tuple[Any, ...], list[Tensor]] = {}
        self._matrices: dict[tuple[Any, ...], Tensor] = {}

    def pair(self, slot: Slot, dtype: torch.dtype, device: torch.device) -> Pair:
        """Return the pair of one module: A (rows, p, features read) and B (rows, p, features written).

        Args:
            slot: the slot of the module.
            dtype: the dtype of the result.
            device: the device of the result.
        """
        source, number, layer = slot
        if is_tracing():  # a tensor from a trace or a transform must not outlive it
            made = self._contract(source, dtype, device, layer)
            return Pair(*(self._rows(made[k][0], m) for k, m in source.place(number)))
        key = source.group.name, dtype, device
        if key not in self._contracted:
            self._contracted.setdefault(key, self._contract(source, dtype, device))
        made = self._contracted[key]
        sides = []
        for k, matrix in source.place(number):
            at = *key, k, matrix, layer if len(made[k]) > 1 else 0
            # All modules with the same A get the same tensor, so that x is multiplied by it once.
            if at not in self._matrices:
                self._matrices.setdefault(at, self._rows(made[k][at[-1]], matrix))
            sides.append(self._matrices[at])
        return Pair(*sides)

    def _rows(self, made: Tensor, matrix: int) -> Tensor:
        """Return one matrix for every row. Only the identity of a cut of full rank is one for all rows."""
        return made.select(-3, matrix).expand(self.size, -1, -1)

    def _contract(
        self,
        source: PairSource,
        dtype: torch.dtype,
        device: torch.device,
        layer: int | None = None,
    ) -> list[Tensor]:
        """Contract the matrices of all layers or of one, in the wider of the dtypes of bank and model."""
        tensors = self._tensors[source.group.name]
        stored = tensors[0].dtype
        wide = torch.promote_types(stored, dtype) if stored.itemsize > 1 else dtype
        with torch.inference_mode(False):  # later forwards use them in any mode
            tensors = [tensor.to(device, wide) for tensor in tensors]
            tensors = list(source.spread(tensors))
            if layer is not None:
                tensors = list(source.of_layers(tensors, [layer]))
            # Contiguous, so that the products with A and B read memory in order.
            return [tensor.to(dtype).contiguous() for tensor in source.contract(tensors)]

    def begin(self, running: object, batch: int | None) -> None:
        """Record the number of rows in the batch of a forward.

        Args:
            running: the forward.
            batch: the number of rows; None if it is not known.
        """
        self._batch = running, batch

    def check(self, x: Tensor, path: str, running: object) -> None:
        """Check that the input of a projection has the rows of the batch.

        Args:
            x: the input.
            path: the path of the projection, for the error message.
            running: the running forward.

        Raises:
            ValueError: the leading axis of x is not the batch, or is not a multiple of the number of rows.
        """
        known, batch = self._batch
        if batch is None or known is not running:
            batch = self.size
        if batch % self.size:
            raise ValueError(
                f"using() named {self.size} rows, but the model was called with a batch of {batch}; "
                "name an adapter, or None, for each row"
            )
        if x.dim() < 3 or x.shape[0] % batch:
            raise ValueError(
                f"the input of {path} has shape {tuple(x.shape)}, which does not begin with the "
                f"batch of {batch}: a bank cannot tell its rows apart; leave it out of targets"
            )


class CurrentBatch:
    """Gives the hooks of a bank the tensors that the rows of this thread or asynchronous task gathered.

    Args:
        sources: the pair source of each group.

    Attributes:
        sources: the argument.
        scope: the running forward.
    """

    def __init__(self, sources: Sequence[PairSource]) -> None:
        self.sources = sources
        self.scope = ForwardScope(())  # the pairs belong to a context, not to one forward
        self._variable: ContextVar[BatchTensors | None] = ContextVar("batch", default=None)

    def get(self) -> BatchTensors | None:
        """Return the gathered tensors; None outside of `use`."""
        return self._variable.get()

    @contextmanager
    def use(self, batch: BatchTensors) -> Iterator[None]:
        """Let forwards within this context use these tensors."""
        token = self._variable.set(batch)
        try:
            yield
        finally:
            self._variable.reset(token)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_variable"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_variable": ContextVar("batch", default=None)}


def row_pairs(group: Group, network: TensorNetwork, alpha: float) -> PairSource:
    """Make the pair source for the rows of a batch: the network with one more mode, the adapters.

    Args:
        group: the sites that share the network.
        network: the network of one adapter; only its legs and sizes are used.
        alpha: the factor of the tensor in the update.
    """
    mode = "adapter"
    while mode in network.sizes:
        mode += "_"
    return PairSource(group, RowsView(network, mode), alpha, (mode,))


class RowsView(NetworkView):
    """A network with one more mode, the rows, on every parameter; it has sizes and no values.

    Args:
        network: the network of one row, which also computes the hashed parameters.
        mode: the name of the new mode.
    """

    def __init__(self, network: TensorNetwork, mode: str) -> None:
        legs = Legs(tuple(Term((mode, *term.legs)) for term in network.legs.terms))
        shapes = network.legs.unhashed.stored_shapes(network.sizes)
        with torch.inference_mode(False):
            like = [torch.zeros(1).expand(2, *shape) for shape in shapes]
        super().__init__(legs, like, (mode, *network.modes))
        self._network = network

    def spread(self, stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the tensors of the terms of all rows."""
        return self._network.spread(stored)
