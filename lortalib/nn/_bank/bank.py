"""A store of many adapters on one model, of which every row of a batch can use its own."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .._anatomy import BlockRule
from .._forward import Handle, detach
from .._group import Group
from .._plan import Plan
from .batch import BatchTensors, CurrentBatch, row_pairs
from .hooks import attach_rows
from .source import Source, SourceReader
from .store import Store


class Bank:
    """Stores many adapters of one shape beside a model of which every row can use its own.

    Each parameter of the tensor networks has one more leg, ``adapter``; the rows of a batch gather
    theirs, and the updates of all rows are batched products, whatever the number of adapters. Made by
    `lortalib.nn.bank`.

    Tensors that are given or returned are those before the scaling by `alpha`, which is applied in
    the forward: ``bank["y"] = bank["x"]`` makes equal rows. An `Adapter`, its folder and another bank
    bring their own scaling: their first tensors are stored times it and divided by `alpha`.

    Adapters can be added, replaced and removed at any time and by several threads: a batch under way
    keeps what it gathered. A call that raises, also for an interrupt, leaves the bank as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        rules: BlockRule | Sequence[BlockRule] = (),
    ) -> None:
        self._model = model
        self._plan = plan
        self._reader = SourceReader(model, plan, rules, dtype, device)
        self._store = Store(self._reader.shapes, capacity, dtype, device)
        self._current = CurrentBatch(
            [row_pairs(group, plan.networks[group.name], self.alpha) for group in plan.groups]
        )
        self._handles: list[Handle] = []
        attach_rows(model, self._current, self._handles)

    # What is in it

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, name: object) -> bool:
        return name in self._store

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._store)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Which sites share which network."""
        return self._plan.groups

    @property
    def alpha(self) -> float:
        """The factor of every tensor in the update."""
        return self._plan.config.scaling

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the parameters are kept."""
        return self._store.dtype

    @property
    def capacity(self) -> int:
        """How many adapters there is room for.

        It doubles when it is used up; while the tensors are copied, old and new are both in memory.
        """
        return self._store.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters that are stored."""
        return self._store.nbytes

    def count(self, trainable_only: bool = True) -> int:
        """How many parameters one adapter has; one that several networks share counts once.

        Args:
            trainable_only: whether parameters marked ``(frozen)`` are left out.
        """
        return self._plan.count(trainable_only)

    def __repr__(self) -> str:
        lines = ", ".join(f"{name}: {legs}" for name, legs in self._reader.legs.items())
        return (
            f"Bank on {type(self._model).__name__}: {len(self):,} adapters of {self.count():,} trainable "
            f"parameters in {self.dtype}, {self.nbytes / 2**20:,.1f} MiB, room for {self.capacity:,} "
            f"({lines})"
        )

    # In and out

    def add(self, name: Hashable, source: Source) -> None:
        """Store an adapter, in the place of one of that name if there is one.

        Args:
            name: any hashable name but None.
            source: an `Adapter` (on any model of this shape), a folder that one was saved to, or for
                each group by name its tensors, in the order of the line and before the scaling by
                `alpha`.

        Raises:
            ValueError: the source has other groups, legs or shapes than the bank, modules that train
                beside it, or values that are not finite in the bank's dtype.
            TypeError: the source is nothing of these.
            FileNotFoundError: a file of the folder is missing.
            AdapterFileError: a file is damaged, or its adapter does not fit the model.

        Example:
            >>> import lortalib
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
            ...                              num_attention_heads=4, intermediate_size=64))
            >>> bank = lortalib.nn.bank(model, "cp", rank=2, alpha=8.0)
            >>> shapes = [(32, 2), (8, 2), (4, 2), (2, 2), (4, 2)]  # in, out, head, layer, matrix
            >>> bank.add("ann", {"encoder": [torch.ones(shape) for shape in shapes]})
            >>> bank["bob"] = bank["ann"]
            >>> list(bank)
            ['ann', 'bob']
        """
        self.update({name: source})

    def update(self, sources: Mapping[Hashable, Source] | Bank) -> None:
        """Store several adapters, in the places of those of their names: all, or none if one is refused.

        Args:
            sources: what `add` takes, by name; or another bank of this shape, whose adapters keep the
                updates that they make there.

        Raises:
            ValueError, TypeError, FileNotFoundError, AdapterFileError: as for `add`.
            KeyError: another thread removed an adapter from the other bank meanwhile.

        Example:
            >>> import lortalib
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
            ...                              num_attention_heads=4, intermediate_size=64))
            >>> small = lortalib.nn.bank(model, "cp", rank=2, alpha=8.0)
            >>> small.update({"ann": small[None], "bob": small[None]})
            >>> large = lortalib.nn.bank(model, "cp", rank=2, capacity=1000)
            >>> large.update(small)
            >>> len(large)
            2
        """
        if isinstance(sources, Bank):
            self._reader.check_alike("the other bank", sources.groups, sources._reader.legs)
            names = list(sources)
            own = self._reader.scaled(sources._store.gather(names), sources.alpha)
            self._store.put(names, self._reader.read_stacked(names, own))
            return
        self._store.put(list(sources), self._reader.read_all(sources))

    def fill(self, names: Sequence[Hashable], tensors: Mapping[str, Sequence[Tensor]]) -> None:
        """Store many adapters from stacked tensors, in a few copies.

        Args:
            names: names that are not in the bank yet.
            tensors: for each group by name its tensors, in the order of the line and before the scaling
                by `alpha`, each of shape (adapters, ...) with a leading axis as long as ``names``.

        Raises:
            ValueError: a name that is None, twice, or in the bank; other groups or shapes than the
                bank's; or values that are not finite in the bank's dtype.

        Example:
            >>> import lortalib
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
            ...                              num_attention_heads=4, intermediate_size=64))
            >>> bank = lortalib.nn.bank(model, "cp", rank=2)
            >>> shapes = [(32, 2), (8, 2), (4, 2), (2, 2), (4, 2)]  # in, out, head, layer, matrix
            >>> bank.fill(range(500), {"encoder": [torch.randn(500, *shape) for shape in shapes]})
            >>> len(bank), bank.capacity >= 500
            (500, True)
        """
        names = list(names)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"fill() takes new names, each once; {twice!r} is there twice")
        self._store.put(names, self._reader.read_stacked(names, tensors), may_replace=False)

    def __setitem__(self, name: Hashable, source: Source) -> None:
        self.add(name, source)

    def __getitem__(self, name: Hashable) -> dict[str, list[Tensor]]:
        """Copies of the tensors of an adapter, for each group by name; zeros for None.

        They are in the order of the line and before the scaling by `alpha`, as `add` takes them.

        Raises:
            KeyError: the name is not in the bank.
        """
        found = self._store.gather([name])
        return {group: [tensor[0] for tensor in tensors] for group, tensors in found.items()}

    def __delitem__(self, name: Hashable) -> None:
        self._store.drop(name)

    def remove(self) -> None:
        """Take the bank off its model, which is then as it was before; may be called again."""
        detach(self._handles)

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
            TypeError: one text in the place of several names.
            RuntimeError: the bank was removed from its model.

        Example:
            >>> import lortalib
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, vocab_size=50,
            ...                              num_attention_heads=4, intermediate_size=64)).eval()
            >>> bank = lortalib.nn.bank(model, "cp", rank=2)
            >>> bank["ann"] = {"encoder": [torch.ones_like(t) for t in bank[None]["encoder"]]}
            >>> with bank.using(["ann", None]):
            ...     adapted, plain = model(torch.tensor([[3, 14], [3, 14]]))[0]
            >>> torch.equal(adapted, plain)
            False
        """
        if isinstance(names, str):
            raise TypeError(
                f"using() needs a name, or None, for every row of the batch; found the text {names!r}: "
                "give it in a list, as often as there are rows"
            )
        names = list(names)
        if not names:
            raise ValueError(
                "using() needs a name, or None, for every row of the batch; found none"
            )
        if not self._handles:
            raise RuntimeError("the bank was removed from its model; make one anew and update() it")
        with self._current.use(BatchTensors(self._store.gather(names), len(names))):
            yield self
