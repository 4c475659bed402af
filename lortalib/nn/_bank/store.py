"""Keeps the stacked tensors of many adapters; each adapter has a place on the leading axis."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shared import SharedParameters, Tensors

#: The floating-point dtypes that have a zero and a sign.
_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
)


class Moment(NamedTuple):
    """Copies of all that a store has at one moment.

    Attributes:
        names: the names of the adapters.
        own: a mapping from the name of each group to the adapters' own tensors, with a leading axis of
            adapters.
        base: all tensors of the adapter that changes nothing, as `Store.snapshot` of None returns them.
    """

    names: list[Hashable]
    own: dict[str, list[Tensor]]
    base: dict[str, list[Tensor]]


class Store:
    """Keeps the tensors of many adapters of one shape, each adapter under a name.

    Every tensor has a leading axis of places; place 0 holds zeros, the adapter that does nothing.
    A lock protects all changes. New values are written to places that nobody reads and are named last, so
    a call that raises, also because of an interrupt, leaves the store unchanged.

    Args:
        shapes: the shape of each parameter of one adapter, under a key.
        keys: a mapping from the name of each group to the keys of its tensors; a parameter of several terms
            or groups is kept once.
        capacity: the number of adapters to make room for.
        dtype: the dtype of the tensors.
        device: the device of the tensors.
        shared: the parameters that all adapters share.

    Raises:
        ValueError: a dtype that cannot hold parameters, or the device meta, which holds no values.
    """

    def __init__(
        self,
        shapes: Mapping[int, tuple[int, ...]],
        keys: Mapping[str, Sequence[int]],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        shared: SharedParameters,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(
                f"dtype must be one of {', '.join(map(str, _DTYPES))}; found {dtype!r}"
            )
        if device.type == "meta":
            raise ValueError("device must be one that holds values, such as 'cpu'; found meta")
        self.dtype = dtype
        self.device = device
        self._shapes = dict(shapes)
        self._keys = dict(keys)
        self._shared = shared
        self._lock = threading.RLock()
        self._places: dict[Hashable, int] = {}
        self._free: list[int] = []  # places below the used end that are free
        self._used = 1
        self._stacks = self._allocate(capacity + 1)
        for stack in self._stacks.values():
            stack[0] = 0

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_lock": threading.RLock()}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[Hashable]:
        return iter(list(self._places))  # a copy, because other threads may add names meanwhile

    @property
    def capacity(self) -> int:
        """The number of adapters that there is room for."""
        return len(next(iter(self._stacks.values()))) - 1

    @property
    def nbytes(self) -> int:
        """The number of bytes of the stored adapters."""
        return len(self) * sum(t[0].numel() * t.itemsize for t in self._stacks.values())

    def gather(self, names: Sequence[Hashable]) -> dict[str, list[Tensor]]:
        """Copy the tensors of these adapters, in this order.

        Args:
            names: their names; None gives zeros, and a name may be repeated.

        Returns:
            A mapping from the name of each group to its tensors, each with a leading axis as long as
            ``names``; a parameter of several terms or groups is one tensor. They are never inference
            tensors, also in inference mode.

        Raises:
            KeyError: a name that is not in the store.
        """
        with self._lock, torch.inference_mode(False):
            places = [0 if name is None else self._place(name) for name in names]
            at = torch.tensor(places, dtype=torch.long, device=self.device)
            found = {key: stack.index_select(0, at) for key, stack in self._stacks.items()}
            return {group: [found[key] for key in keys] for group, keys in self._keys.items()}

    def snapshot(self, names: Sequence[Hashable]) -> dict[str, list[Tensor]]:
        """Copy the tensors of these adapters together with the shared parameters of the same moment.

        Args:
            names: as for `gather`.

        Returns:
            All tensors of each group in the order of the line. Shared parameters that require gradients are
            the parameters themselves, and copies otherwise.
        """
        with self._lock:
            return self.joined(self.gather(names))

    def moment(self) -> Moment:
        """Copy all adapters together with the shared parameters of the same moment."""
        with self._lock:
            names = list(self._places)
            return Moment(names, self.gather(names), self.snapshot([None]))

    def joined(self, own: Tensors) -> dict[str, list[Tensor]]:
        """Put own tensors and the present shared parameters together, as `snapshot` does."""
        with self._lock, torch.inference_mode(False):
            return self._shared.join(own)

    def put(
        self,
        names: Sequence[Hashable],
        tensors: Mapping[str, Sequence[Tensor]],
        *,
        may_replace: bool = True,
        shared: Tensors | None = None,
    ) -> None:
        """Store the tensors of these adapters.

        Args:
            names: their names, each once.
            tensors: a mapping from the name of each group to its tensors, each with a leading axis as
                long as ``names``.
            may_replace: whether an adapter with the same name is replaced.
            shared: values of the shared parameters, which they get if the store is empty.

        Raises:
            ValueError: a name is in use and may not be replaced, or other adapters have other values of the
                shared parameters.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if not names:
                if shared is not None and not self._places:
                    with self._shared.changed(shared):
                        pass
                return
            if shared is not None and self._places:
                self._shared.check_equal(shared, f"adapter {names[0]!r}")
                shared = None
            old = {name: self._places[name] for name in names if name in self._places}
            if old and not may_replace:
                raise ValueError(
                    f"fill() takes new names; {next(iter(old))!r} is in the bank already: delete it "
                    "first, or replace it by update()"
                )
            kept = max(0, len(self._free) - len(names))  # the free places that stay free
            recycled = self._free[kept:]
            end = self._used + len(names) - len(recycled)
            places = [*recycled, *range(self._used, end)]
            stacks = self._with_room(end)
            self._write(stacks, places, tensors)
            before = self._stacks, self._used
            with self._shared.changed(shared or {}):
                try:
                    self._stacks, self._used = stacks, end
                    self._free[kept:] = old.values()
                    self._places.update(zip(names, places))
                except BaseException:
                    self._stacks, self._used = before
                    self._free[kept:] = recycled
                    self._places.update(old)
                    for name in names:
                        if name not in old:
                            self._places.pop(name, None)
                    raise

    def drop(self, name: Hashable) -> None:
        """Remove an adapter; the next one that is stored gets its place.

        Raises:
            KeyError: the name is not in the store.
        """
        with self._lock:
            place, free = self._place(name), len(self._free)
            try:
                self._free.append(place)
                del self._places[name]
            except BaseException:
                if name in self._places:
                    del self._free[free:]
                raise

    def _place(self, name: Hashable) -> int:
        if name not in self._places:
            raise KeyError(f"no adapter {name!r} in the bank, which holds {len(self):,}")
        return self._places[name]

    def _allocate(self, places: int) -> dict[int, Tensor]:
        """Allocate stacks with so many places, without values."""
        with torch.inference_mode(False):  # the stacks outlive the mode in which they are made
            # Pages of an empty tensor take memory only when they are first written.
            return {
                key: torch.empty((places, *shape), dtype=self.dtype, device=self.device)
                for key, shape in self._shapes.items()
            }

    def _with_room(self, places: int) -> dict[int, Tensor]:
        """Return the stacks if they have so many places, else copies with at least twice as many."""
        room = self.capacity + 1
        if places <= room:
            return self._stacks
        larger = self._allocate(max(places, 2 * room))
        for key, stack in self._stacks.items():
            larger[key][: self._used] = stack[: self._used]
        return larger

    def _write(
        self,
        stacks: Mapping[int, Tensor],
        places: Sequence[int],
        tensors: Mapping[str, Sequence[Tensor]],
    ) -> None:
        """Write to places that have no name yet; tensors of one parameter are equal."""
        start, stop = places[0], places[0] + len(places)
        at: Any = slice(start, stop)
        if places != list(range(start, stop)):
            at = torch.tensor(places, device=self.device)
        found = {k: v for group, vs in tensors.items() for k, v in zip(self._keys[group], vs)}
        for key, value in found.items():
            stacks[key][at] = value
