"""Holds the tensors that the rows of a batch gathered from a bank, for the hooks of the model."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..._torch import is_in_backward, is_tracing
from ...decomp import Legs, NetworkView, TensorNetwork, Term
from .._forward import EvenRows, Pair, PairSource, RowMaps, Slot, TokenRows
from .._group import Group
from .._recompute import CheckpointScope, Remembered

#: The matrices of all modules of a network, by tensor, layer and matrix.
Matrices = list[list[list[Tensor]]]

#: The matrices by the name of the group, dtype, device, and whether they have a graph.
Cache = dict[tuple[str, torch.dtype, torch.device, bool], Matrices]


class BatchTensors:
    """The tensors that the rows of one context gathered, and the low-rank pairs made from them.

    Args:
        tensors: a mapping from the name of each group to its tensors: those of the rows, with a leading
            axis of rows, and those that all adapters share.
        layout: the arrangement of the batch in rows.
        shape: (rows,), of which a batch is a multiple; or (rows, tokens) of the batch.

    Attributes:
        size: the number of rows.
        closed: whether the context was left.
        previous: the tensors of the context around this one.
        trains: whether gradients reach one of the tensors.
    """

    def __init__(
        self,
        tensors: Mapping[str, Sequence[Tensor]],
        layout: EvenRows | TokenRows,
        shape: tuple[int, ...],
    ) -> None:
        self.size = shape[0]
        self.closed = False
        self.previous: BatchTensors | None = None
        self._shape = shape
        self._layout = layout
        self._tensors = tensors
        self.trains = any(t.requires_grad for each in tensors.values() for t in each)
        self._batch: tuple[Callable[[], object], int | None] = (lambda: None), None
        self._media: frozenset[int] = frozenset()
        self._made: Cache = {}
        self._of_forward: tuple[Callable[[], object], Cache] = (lambda: None), {}

    def pair(
        self, slot: Slot, dtype: torch.dtype, device: torch.device, running: object
    ) -> tuple[Pair, RowMaps]:
        """Return the pair of one module, and what its rows have between the two maps.

        A map is (p, features) if it is the same for all rows, else (rows, p, features).

        Args:
            slot: the slot of the module.
            dtype: the dtype of the result.
            device: the device of the result.
            running: the forward; None while torch traces.
        """
        source, number, layer = slot
        if running is None:  # a tensor from a trace or a transform must not outlive it
            made, layer = self._of_layer(source, dtype, device, layer), 0
        else:
            gradients = self.trains and torch.is_grad_enabled()
            cache, key = self._cache(running), (source.group.name, dtype, device, gradients)
            if key not in cache:
                # Later forwards use them in any mode; leaving inference mode enables gradients.
                with torch.inference_mode(False), torch.set_grad_enabled(gradients):
                    stored, wide = self._stored(source, dtype)
                    made = source.matrices(stored, dtype, device, wide)
                    cache.setdefault(key, [[_without_rows(m) for m in each] for each in made])
            made = cache[key]
        first, second, *middle = (made[k][layer][matrix] for k, matrix in source.place(number))
        if not middle:
            return Pair(first, second), RowMaps(self._layout, None)
        writer = source.signature(number).writer
        return Pair(first, second), RowMaps(self._layout, _in_order_of_use(middle[0], writer))

    def _cache(self, running: object) -> Cache:
        """Return the matrices made so far: in this context; or in this forward if parameters train, since an
        optimiser can change them within the context."""
        if not self.trains:
            return self._made
        if self._of_forward[0]() is not running:
            self._of_forward = weakref.ref(running), {}
        return self._of_forward[1]

    def tensors_of(self, group: str) -> list[Tensor]:
        """Return the tensors of a group, in the order of the line."""
        return list(self._tensors[group])

    def _stored(self, source: PairSource, dtype: torch.dtype) -> tuple[list[Tensor], torch.dtype]:
        """Return the tensors of a network, and the widest of the dtypes of bank and model."""
        tensors = self.tensors_of(source.group.name)
        for stored in (tensor.dtype for tensor in tensors if tensor.itemsize > 1):
            dtype = torch.promote_types(stored, dtype)
        return tensors, dtype

    def _of_layer(
        self, source: PairSource, dtype: torch.dtype, device: torch.device, layer: int
    ) -> Matrices:
        """Compute the matrices of one layer in plain operations, which traces and transforms can follow."""
        tensors, wide = self._stored(source, dtype)
        tensors = list(source.spread([tensor.to(device, wide) for tensor in tensors]))
        made = source.contract(source.of_layers(tensors, [layer]))
        return [[_without_rows(tensor[0].to(dtype))] for tensor in made]

    def begin(self, running: object, batch: int | None, media: Iterable[int] = ()) -> None:
        """Record the number of rows in the batch of a forward.

        Args:
            running: the forward.
            batch: the number of rows; None if it is not known.
            media: the numbers of pictures or sounds that were given beside texts.
        """
        # Weakly: its frame has tensors whose graph can keep a checkpoint, which keeps what is remembered for
        # it; Python cannot collect a circle through the graph.
        self._batch = (lambda: None) if running is None else weakref.ref(running), batch
        self._media = frozenset(media) - {batch}

    def check(self, x: Tensor, path: str, running: object) -> None:
        """Check that the input of a projection has the rows, or the tokens, of the batch.

        Args:
            x: the input.
            path: the path of the projection, for the error message.
            running: the running forward.

        Raises:
            ValueError: the leading axis of x is not the batch, or is not a multiple of the number of rows;
                or x has other tokens than were named.
        """
        if len(self._shape) == 2:
            if x.shape[:-1] not in (self._shape, (math.prod(self._shape),)):
                raise ValueError(
                    f"using() named adapters for {self._shape[0]} rows of {self._shape[1]} tokens, but the "
                    f"input of {path} has shape {tuple(x.shape)}; enter a context with the names of its "
                    "tokens for each forward, or name one adapter for each row"
                )
            return
        known, batch = self._batch[0](), self._batch[1]
        if batch is None or known is not running:
            batch = self.size
        if self.size > 1 and known is running and x.shape[0] in self._media:
            raise ValueError(
                f"the input of {path} has {x.shape[0]} pictures or sounds for a batch of {batch} rows: a "
                "bank cannot tell whose they are; leave these modules out of targets"
            )
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
        remembered: the tensors of the forwards that checkpoints may run again.
    """

    def __init__(self, sources: Sequence[PairSource]) -> None:
        self.sources = sources
        self.scope = CheckpointScope(())  # the pairs belong to a context, not to one forward
        self._variable: ContextVar[BatchTensors | None] = ContextVar("batch", default=None)
        self.remembered = Remembered()

    def get(self) -> BatchTensors | None:
        """Return the gathered tensors; None outside of `use`. A checkpoint that runs its forward again gets
        those of the first run.

        Raises:
            RuntimeError: the bank was made after the forward that runs again.
        """
        batch = self._open() or self._default()
        if is_tracing():
            return batch
        if is_in_backward():
            found: BatchTensors | None = self.remembered.recall(batch, "the bank")
            return found
        if self.scope.may_be_checkpointed():
            self.remembered.record(batch)
        return batch

    def _open(self) -> BatchTensors | None:
        """Return the tensors of the innermost context that is open."""
        batch = self._variable.get()
        while batch is not None and batch.closed:
            batch = batch.previous
        return batch

    def _default(self) -> BatchTensors | None:
        """Return the tensors of forwards outside of contexts."""
        return None

    @contextmanager
    def use(self, batch: BatchTensors) -> Iterator[None]:
        """Let forwards within this context use these tensors."""
        batch.previous = self._open()
        self._variable.set(batch)
        try:
            yield
        finally:
            # Generators can close their contexts in any order, and in another context of Python.
            batch.closed = True
            self._variable.set(self._open())

    def __getstate__(self) -> dict[str, Any]:
        return {"sources": self.sources, "scope": self.scope}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["sources"])  # type: ignore[misc]
        self.scope = state["scope"]


def _without_rows(matrices: Iterable[Tensor]) -> list[Tensor]:
    """Drop the axis of rows of maps (rows, p, features) that are the same for all rows."""
    # Once and not for each module: x is multiplied once by an A that several modules have as one object.
    return [each[0] if each.dim() == 3 and len(each) == 1 else each for each in matrices]


def _in_order_of_use(middle: Tensor, writer: bool) -> Tensor:
    """Give a middle (rows, heads, c, p, q) the axes (rows, heads read, heads written, c, p read, p written).

    Args:
        middle: the middle from the side of ``in`` to that of ``out``.
        writer: whether the module writes to the stream, and so uses the three maps from ``out`` to ``in``.
    """
    return middle.unsqueeze(2).mT if writer else middle.unsqueeze(1)


def row_pairs(
    group: Group, network: TensorNetwork, alpha: float, common: Sequence[bool]
) -> PairSource:
    """Make the pair source for the rows of a batch: the network with one more mode, the adapters.

    Args:
        group: the sites that share the network.
        network: the network of one adapter; only its legs and sizes are used.
        alpha: the factor of the tensor in the update.
        common: for each term of the line, whether all rows have its parameter in common.
    """
    mode = "adapter"
    while mode in network.sizes:
        mode += "_"
    return PairSource(group, RowsView(network, mode, common), alpha, mode)


class RowsView(NetworkView):
    """A network with one more mode, the rows, on every parameter that is not common to them; it has sizes and
    no values.

    Args:
        network: the network of one row, which also computes the hashed parameters.
        mode: the name of the new mode.
        common: for each term of the line, whether all rows have its parameter in common.
    """

    def __init__(self, network: TensorNetwork, mode: str, common: Sequence[bool]) -> None:
        terms = network.legs.terms
        legs = Legs(tuple(Term(t.legs if c else (mode, *t.legs)) for t, c in zip(terms, common)))
        shapes = network.legs.unhashed.stored_shapes(network.sizes)
        with torch.inference_mode(False):
            like = [
                torch.zeros(1).expand(*(() if is_common else (2,)), *shape)
                for is_common, shape in zip(common, shapes)
            ]
        super().__init__(legs, like, (mode, *network.modes))
        self._network = network

    def spread(self, stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the tensors of the terms of all rows."""
        return self._network.spread(stored)
