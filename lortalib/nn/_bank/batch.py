"""The rows of a batch: what each gathered from a bank, and the hooks that add its share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._forward import Adding, Factors, Pair, Part, add, owns_output

if TYPE_CHECKING:
    from .bank import Bank


class Rows:
    """What the rows of one context gathered, and the pairs made of it.

    Attributes:
        size: number of rows.
        batch: of the model's last forward, once known.
    """

    def __init__(self, store: Mapping[str, Sequence[Tensor]], slots: Sequence[int]) -> None:
        self.size = len(slots)
        self.batch: int | None = None
        with torch.no_grad():
            self._tensors = {
                name: [t.index_select(0, torch.tensor(slots, device=t.device)) for t in tensors]
                for name, tensors in store.items()
            }
        self._made: dict[tuple[Any, ...], list[Tensor]] = {}
        self._pairs: dict[tuple[Any, ...], Tensor] = {}

    def pair(self, factors: Factors, kind: int, layer: int, like: Tensor) -> Pair:
        """First (rows, p, features read) and second (rows, p, features written) of one module."""
        made = self._all(factors, like)
        return Pair(*(self._at(made, factors, place, layer) for place in factors.places[kind]))

    def _all(self, factors: Factors, like: Tensor) -> list[Tensor]:
        key = factors.group.name, like.dtype, like.device
        if key not in self._made:
            with torch.no_grad():
                tensors = [t.to(like.device, like.dtype) for t in self._tensors[key[0]]]
                made, factors.places = factors.make(tensors)
                # Products run along rows.
                self._made[key] = [tensor.contiguous() for tensor in made]
        return self._made[key]

    def _at(self, made: Sequence[Tensor], factors: Factors, place: Any, layer: int) -> Tensor:
        """The very same tensor for all that read alike, so that x is read once for them."""
        tensor = made[place.tensor]
        layer = layer if len(tensor) > 1 else 0
        key = factors.group.name, place, layer, tensor.dtype, tensor.device
        if key not in self._pairs:
            self._pairs[key] = tensor[layer].select(-3, place.matrix)
        return self._pairs[key]

    def check(self, x: Tensor, path: str) -> None:
        """Hold the input of a projection against the rows.

        Raises:
            ValueError: its leading axis is not that of the batch.
        """
        batch = self.batch or self.size
        if batch % self.size:
            raise ValueError(
                f"using() named {self.size} rows, but the model was called with a batch of {batch}; "
                "name an adapter, or None, for each row"
            )
        if x.dim() < 3 or x.shape[0] % batch:
            raise ValueError(
                f"the input of {path} has shape {tuple(x.shape)}, which does not begin with the "
                f"batch of {batch}: a bank cannot tell its rows apart"
            )


class BatchSize:
    """A forward pre-hook of the model: how many rows this forward has."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Torch's forward pre-hook with keyword arguments."""
        rows = self.bank.chosen()
        if rows is not None:
            given = (*args, *kwargs.values())
            tensors = (value for value in given if isinstance(value, Tensor) and value.dim() > 1)
            first = next(tensors, None)
            rows.batch = None if first is None else len(first)


class RowShare(Adding):
    """A forward hook: adds to every row the share of its own adapter."""

    def __init__(self, bank: Bank, sites: Sequence[Any]) -> None:
        self.bank = bank
        self.path = sites[0].path
        self.parts = [
            Part(factors, factors.add(bundle), bundle.layer)
            for factors, bundle in bank.bundles(sites)
        ]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Torch's forward hook: the projection's output with the rows' shares added."""
        rows = self.bank.chosen()
        if rows is None:
            return None
        whole = isinstance(output, tuple)
        x, y = args[0], output[0] if whole else output
        rows.check(x, self.path)
        own = owns_output(module)
        for factors, kind, layer in self.parts:
            first, second = rows.pair(factors, kind, layer, y)
            h = self.bank.reads.project(x, first, factors.readers(kind), 0.0)
            y = add(y, h, second, own)
            own = True
        return (y, *output[1:]) if whole else y
