"""Many adapters of one shape on one model, a different one for every row of a batch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike
from typing import Any, Union

import torch
from torch import Tensor, nn

from ...decomp import Network
from ...decomp._formats import Rank
from ...decomp._legs import Legs, Term
from ...decomp._network import NetworkView
from .._adapter import Adapter
from .._anatomy import BlockRule
from .._files import read_adapter
from .._forward import Bundle, Factors, Reads, by_module, release, surround
from .._group import Group
from .._plan import Decomposition, Targets, plan
from .batch import BatchSize, Rows, RowShare

#: What `Bank.add` takes: an adapter, its folder, or for each group its tensors in the order of the line.
Source = Union[Adapter, str, "PathLike[str]", Mapping[str, Sequence[Tensor]]]


#: The mode by which the parameters of a bank are indexed.
ADAPTER = "adapter"


#: Attention classes that compute with time before batch: their rows are not those of the batch.
_TIME_FIRST = frozenset(
    (
        "LEDEncoderSelfAttention",
        "LongformerSelfAttention",
        "Mask2FormerAttention",
        "OneFormerAttention",
    )
)


class Bank:
    """A store of many adapters of one shape, and a model whose every row can use its own.

    Each parameter of the tensor networks has one more leg, ``adapter``; the rows of a batch gather
    theirs, and the shares of all rows are batched products, whatever the number of adapters. Position 0
    is the adapter that does nothing. Made by `lortalib.nn.bank`.

    Adapters can be added, replaced and removed at any time: a batch under way keeps what it gathered.

    Attributes:
        groups: which sites share which network.
        dtype: in which the numbers are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        networks: Mapping[str, Network],
        *,
        scaling: float,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.groups = tuple(groups)
        self.dtype = dtype
        self.reads = Reads()
        self._scaling = scaling
        self._legs = {name: network.legs for name, network in networks.items()}
        self._store: dict[str, list[Tensor]] = {}
        self._factors: list[Factors] = []
        self._position: dict[Hashable, int] = {}
        self._free: list[int] = []
        self._used = 1
        self._rows: ContextVar[Rows | None] = ContextVar("rows", default=None)
        for group in self.groups:
            network = networks[group.name]
            # Pages of an empty tensor take memory when they are first written.
            self._store[group.name] = [
                torch.empty((capacity + 1, *tensor.shape), dtype=dtype, device=device)
                for tensor in network.tensors
            ]
            for tensor in self._store[group.name]:
                tensor[0] = 0
            legs = Legs(tuple(Term((ADAPTER, *term.legs)) for term in network.legs.terms))
            zeros = [torch.zeros(1).expand(2, *tensor.shape) for tensor in network.tensors]
            like = NetworkView(legs, zeros, (ADAPTER, *network.modes))
            self._factors.append(Factors(group, like, 1.0, self.reads, (ADAPTER,)))
        self._model = model
        model.register_forward_pre_hook(BatchSize(self), with_kwargs=True)
        surround(model, self, self.groups)
        for path, sites in by_module(site for group in groups for site in group.sites):
            model.get_submodule(path).register_forward_hook(RowShare(self, sites))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_rows": ContextVar("rows", default=None)}

    # What is in it

    def __len__(self) -> int:
        return len(self._position)

    def __contains__(self, name: object) -> bool:
        return name in self._position

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._position)

    @property
    def capacity(self) -> int:
        """How many adapters there is room for; it doubles when it is used up."""
        return len(next(iter(self._store.values()))[0]) - 1

    @property
    def count(self) -> int:
        """How many numbers one adapter has."""
        return sum(tensor[0].numel() for tensors in self._store.values() for tensor in tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters that are stored."""
        return len(self) * self.count * torch.empty((), dtype=self.dtype).element_size()

    def __repr__(self) -> str:
        lines = ", ".join(f"{name}: {legs}" for name, legs in self._legs.items())
        return (
            f"Bank on {type(self._model).__name__}: {len(self):,} adapters of {self.count:,} numbers in "
            f"{self.dtype}, {self.nbytes / 2**20:,.1f} MiB, room for {self.capacity:,} ({lines})"
        )

    # In and out

    def add(self, name: Hashable, source: Source) -> None:
        """Store an adapter, in the place of one of that name if there is one.

        Args:
            name: any hashable name but None.
            source: an `Adapter` (on any model of this shape), a folder that one was saved to, or for
                each group by name its tensors, in the order of the line; these are taken as scaled by
                the bank's ``alpha``.

        Raises:
            ValueError: the shapes differ, numbers are not finite, or modules train beside the adapter.
                Then nothing is changed.
        """
        self.update({name: source})

    def update(self, sources: Mapping[Hashable, Source]) -> None:
        """Store several adapters; see `add`. All are checked before one is stored."""
        checked = {name: self._tensors(name, source) for name, source in sources.items()}
        for name, tensors in checked.items():
            position = self._place(name)
            for group, values in tensors.items():
                for store, value in zip(self._store[group], values):
                    store[position].copy_(value)
            self._position[name] = position

    def fill(self, names: Sequence[Hashable], tensors: Mapping[str, Sequence[Tensor]]) -> None:
        """Store many adapters from stacked tensors, in a few copies.

        Args:
            names: names that are not in the bank yet.
            tensors: for each group by name its tensors, each with a leading axis as long as ``names``.

        Raises:
            ValueError: a name that is there already or twice, or shapes that differ.
        """
        names = list(names)
        if len({*names, *self._position}) < len(names) + len(self) or None in names:
            raise ValueError(
                "fill() takes new names, each once, and not None; use update() for others"
            )
        for name in self._store:
            found = [tuple(tensor.shape) for tensor in tensors.get(name, ())]
            wanted = [(len(names), *tensor.shape[1:]) for tensor in self._store[name]]
            if found != wanted or set(tensors) != set(self._store):
                raise ValueError(
                    f"group {name!r} needs tensors of the shapes {wanted}; found {found}"
                )
        self._grow(self._used + len(names))
        start, self._used = self._used, self._used + len(names)
        for name, values in tensors.items():
            for store, value in zip(self._store[name], values):
                store[start : self._used].copy_(value)
        self._position.update(zip(names, range(start, self._used)))

    def __setitem__(self, name: Hashable, source: Source) -> None:
        self.add(name, source)

    def __getitem__(self, name: Hashable) -> dict[str, list[Tensor]]:
        """Copies of the tensors of an adapter, for each group by name."""
        position = self._positions([name])[0]
        return {
            group: [store[position].clone() for store in stores]
            for group, stores in self._store.items()
        }

    def __delitem__(self, name: Hashable) -> None:
        self._free.append(self._positions([name])[0])
        del self._position[name]

    def remove(self) -> None:
        """Take the bank off its model, which is then as it was before."""
        release(self._model, self, self.groups)
        for module in self._model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for number in [n for n, hook in hooks.items() if _is_of(hook, self)]:
                    del hooks[number]
                    module._forward_pre_hooks_with_kwargs.pop(number, None)

    # In use

    @contextmanager
    def using(self, names: Iterable[Hashable]) -> Iterator[Bank]:
        """Within this context every row of a batch uses the adapter named for it.

        Works with generate(), whose copies of a row (beams, several sequences) use the row's adapter.
        Each thread and each asynchronous task has a choice of its own. Adapters that are replaced
        meanwhile take effect in the next context.

        Args:
            names: a name for each row, or None for rows without an adapter.

        Raises:
            KeyError: a name that is not in the bank.
            ValueError: no rows; and from the model's forward, a batch that these rows do not divide.
        """
        slots = self._positions(list(names))
        if not slots:
            raise ValueError("using() needs a name, or None, for every row of the batch")
        token = self._rows.set(Rows(self._store, slots))
        try:
            yield self
        finally:
            self._rows.reset(token)

    def chosen(self) -> Rows | None:
        """What the rows of the context under way gathered; None outside of `using`."""
        return self._rows.get()

    def doubt(self) -> None:
        """Nothing to compare: what the rows use was gathered when their context began."""

    def bundles(self, sites: Sequence[Any]) -> Iterator[tuple[Factors, Bundle]]:
        """The sites of one module by group, with what makes their pairs."""
        for factors in self._factors:
            own = tuple(site for site in sites if site in factors.group.sites)
            if own:
                yield factors, Bundle(factors.group, own)

    def _positions(self, names: Sequence[Hashable]) -> list[int]:
        try:
            return [0 if name is None else self._position[name] for name in names]
        except KeyError as error:
            raise KeyError(
                f"no adapter {error.args[0]!r} in the bank, which holds {len(self):,}"
            ) from None

    def _place(self, name: Hashable) -> int:
        """A position for this name; replacing takes the old one."""
        if name in self._position:
            return self._position[name]
        if self._free:
            return self._free.pop()
        self._grow(self._used + 1)
        self._used += 1
        return self._used - 1

    def _grow(self, positions: int) -> None:
        """Room for so many positions, at least twice as many as before if there are too few."""
        room = self.capacity + 1
        if positions <= room:
            return
        for stores in self._store.values():
            for k, store in enumerate(stores):
                larger = store.new_empty((max(positions, 2 * room), *store.shape[1:]))
                larger[: self._used] = store[: self._used]
                stores[k] = larger

    def _tensors(self, name: Hashable, source: Source) -> dict[str, list[Tensor]]:
        """The tensors of a source, scaled and checked."""
        if name is None:
            raise ValueError(
                "None stands for rows without an adapter; give the adapter another name"
            )
        if isinstance(source, (str, PathLike)):
            source = read_adapter(self._model, source)
        if isinstance(source, Adapter):
            tensors = self._of_adapter(name, source)
        else:
            tensors = {
                group: [values[0] * self._scaling, *values[1:]] for group, values in source.items()
            }
        for group, stores in self._store.items():
            found = [tuple(value.shape) for value in tensors.get(group, ())]
            wanted = [tuple(store.shape[1:]) for store in stores]
            if found != wanted or set(tensors) != set(self._store):
                raise ValueError(
                    f"adapter {name!r} does not fit the bank: group {group!r} ({self._legs[group]}) has "
                    f"tensors of the shapes {wanted}; found {found or f'the groups {list(tensors)}'}"
                )
            if not all(torch.isfinite(value).all() for value in tensors[group]):
                raise ValueError(f"adapter {name!r} holds NaN or infinity in group {group!r}")
        return tensors

    def _of_adapter(self, name: Hashable, adapter: Adapter) -> dict[str, list[Tensor]]:
        if adapter.trained_modules.paths:
            raise ValueError(
                f"adapter {name!r} trains whole modules ({', '.join(adapter.trained_modules.paths)}), of "
                "which the rows of one batch cannot have different values"
            )
        own = {group.name: group for group in self.groups}
        tensors = {}
        for group in adapter.groups:
            network, mine = adapter.network(group), own.get(group.name)
            if mine is None or [s.key for s in group.sites] != [s.key for s in mine.sites]:
                raise ValueError(
                    f"adapter {name!r} does not fit the bank: its group {group.name!r} adapts other "
                    "projections"
                )
            if str(network.legs) != str(self._legs[group.name]):
                raise ValueError(
                    f"adapter {name!r} does not fit the bank: its group {group.name!r} has the legs\n"
                    f"    {network.legs}\nand the bank's\n    {self._legs[group.name]}"
                )
            first, *rest = (tensor.detach() for tensor in network.tensors)
            tensors[group.name] = [first * adapter.scaling, *rest]
        return tensors


def _is_of(hook: object, owner: Bank) -> bool:
    return isinstance(hook, (BatchSize, RowShare)) and hook.bank is owner


def bank(
    model: nn.Module,
    decomposition: Decomposition = "cp",
    rank: Rank = 8,
    *,
    capacity: int = 64,
    alpha: float = 1.0,
    targets: Targets = "qkvo",
    layers: int | Iterable[int] | None = None,
    gqa: str = "pool",
    share_residual: bool = False,
    rules: BlockRule | Sequence[BlockRule] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Bank:
    """Make a store of many adapters of one shape on a model, for batches in which rows differ.

    Args:
        model: the model; nothing of it is replaced, until ``bank.remove()``.
        decomposition: as for `apply`.
        rank: as for `apply`.
        capacity: how many adapters to make room for; the room doubles when it is used up.
        alpha: scaling of adapters given as bare tensors; an `Adapter` brings its own.
        targets: as for `apply`.
        layers: as for `apply`.
        gqa: as for `apply`.
        share_residual: as for `apply`; every network then stores the shared factor.
        rules: as for `apply`.
        dtype: in which the numbers are kept; computation follows the model's.
        device: where they are kept, by default with the model's weights. What a batch gathers moves to
            the model, so a bank can lie in main memory beside a model on a GPU.

    Returns:
        The empty `Bank`.

    Raises:
        AnatomyError: the model's attention was not, or not wholly, found.
        ValueError: a bad argument; or projections that the rows of a batch cannot share: packed
            experts, weights read directly, and attention that puts time before batch.

    Example:
        >>> import torch, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, vocab_size=50,
        ...                              num_attention_heads=4, intermediate_size=64)).eval()
        >>> bank = lortalib.nn.bank(model, "cp", rank=2)
        >>> for name in ("ann", "bob"):
        ...     adapter = lortalib.nn.apply(model, "cp", rank=2, init="normal")
        ...     bank[name] = adapter
        ...     adapter.remove()
        >>> with bank.using(["bob", None, "ann"]):
        ...     output = model(torch.tensor([[3, 14], [15, 9], [26, 5]]))
        >>> len(bank), bank.count
        (2, 100)
    """
    if not isinstance(capacity, int) or capacity < 1:
        raise ValueError(f"capacity must be a positive integer; found {capacity!r}")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"alpha must be a finite number other than 0; found {alpha!r}")
    groups, networks = plan(
        model,
        decomposition,
        rank,
        targets=targets,
        layers=layers,
        gqa=gqa,
        rules=rules,
        options={"init": "invariant", "generator": None, "dtype": torch.float32},
        share_residual=share_residual,
    )
    for group in groups:
        for site in group.sites:
            owner = type(model.get_submodule(site.path.rpartition(".")[0])).__name__
            if site.experts or site.weight_read_directly or owner in _TIME_FIRST:
                why = "packs experts" if site.experts else "does not see the batch as rows"
                raise ValueError(
                    f"{site.path} {why}, so the rows of a batch cannot have adapters of their own "
                    "there; leave it out of targets"
                )
    if device is None:
        device = next(iter(networks.values())).tensors[0].device
    return Bank(
        model,
        groups,
        networks,
        scaling=float(alpha),
        capacity=capacity,
        dtype=dtype,
        device=torch.device(device),
    )
