"""Defines the store of many adapters on one model, from which every row of a batch can use its own."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...decomp import Legs
from .._adapters import adapters
from .._anatomy import BlockRule
from .._base_weights import weight_name
from .._forward import EvenRows, Handle, detach
from .._group import Group
from .._plan import Plan
from .batch import BatchTensors, CurrentBatch, row_pairs
from .chosen import Names, read_names
from .hooks import attach_rows
from .shared import SharedParameters
from .source import Source, SourceReader
from .store import Store


class Bank:
    """Stores many adapters of one shape on a model, so that every row of a batch can use its own.

    Each parameter of the tensor networks has one more leg, ``adapter``. The rows of a batch gather
    their slices, and the updates of all rows are batched products, however many adapters there are.
    `lortalib.nn.bank` makes a bank.

    Tensors go in and come out without the scaling by `alpha`, which the forward applies:
    ``bank["y"] = bank["x"]`` makes two equal adapters. An `Adapter`, its folder and another bank have
    a scaling of their own, which is converted to this bank's.

    Several threads can add, replace and remove adapters at any time: a running batch keeps the tensors
    that it gathered. A call that raises, also because of an interrupt, leaves the bank unchanged.
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
        wide = torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32
        self._shared = SharedParameters(plan.networks, device, wide)
        self._reader = SourceReader(model, plan, self._shared, rules, dtype, device)
        self._store = Store(self._reader.shapes, capacity, dtype, device, self._shared)
        for network in plan.networks.values():
            network.place_index(device)  # the plan's networks are on the meta device
        self._current = CurrentBatch(
            [row_pairs(group, plan.networks[group.name], self.alpha) for group in plan.groups]
        )
        self._handles: list[Handle] = []
        attach_rows(model, self._current, self._handles)

    # Contents

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, name: object) -> bool:
        return name in self._store

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._store)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of sites that share a network."""
        return self._plan.groups

    @property
    def legs(self) -> dict[str, Legs]:
        """The line of each group's network by the name of the group, with the mark ``(shared)``."""
        return dict(self._reader.legs)

    @property
    def alpha(self) -> float:
        """The factor by which the forward multiplies every tensor."""
        return self._plan.config.scaling

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored parameters."""
        return self._store.dtype

    @property
    def capacity(self) -> int:
        """The number of adapters that there is room for.

        It doubles when the room is used up; while tensors are copied, old and new ones are in memory.
        """
        return self._store.capacity

    @property
    def nbytes(self) -> int:
        """The number of bytes of the stored adapters, without the parameters that they share."""
        return self._store.nbytes

    @property
    def shared(self) -> dict[str, list[nn.Parameter]]:
        """The parameters marked ``(shared)`` of each group by its name, in the order of the line.

        All adapters use them. They do not train unless ``requires_grad_()`` is called on them.
        """
        return {group: list(parameters) for group, parameters in self._shared.parameters.items()}

    def count(self, trainable_only: bool = True) -> int:
        """Count the parameters that one adapter has of its own; one in several networks counts once.

        Args:
            trainable_only: whether parameters marked ``(frozen)`` are left out.
        """
        return self._plan.count(trainable_only, shared=False)

    def __repr__(self) -> str:
        lines = ", ".join(f"{name}: {legs}" for name, legs in self._reader.legs.items())
        return (
            f"Bank on {type(self._model).__name__}: {len(self):,} adapters of {self.count():,} trainable "
            f"parameters in {self.dtype}, {self.nbytes / 2**20:,.1f} MiB, room for {self.capacity:,}"
            + f", {sum(p.numel() for p in self._shared.distinct):,} shared" * bool(self._shared)
            + f" ({lines})"
        )

    # Adding and reading

    def add(self, name: Hashable, source: Source) -> None:
        """Store an adapter; one with the same name is replaced.

        Args:
            name: any hashable name but None.
            source: an `Adapter` (on any model of this shape), a folder that one was saved to, or a
                mapping from the name of each group to its tensors, in the order of the line and
                without the scaling by `alpha`.

        Raises:
            ValueError: the source has other groups, legs or shapes than the bank, has trained modules,
                or has values that are not finite in the bank's dtype.
            TypeError: a source of another type.
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
        """Store several adapters, replacing adapters of the same names. If one is refused, none is stored.

        Args:
            sources: a mapping from names to sources, as `add` takes them; or another bank of this shape,
                whose adapters make the same updates in this bank.

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
            stacked, shared = self._reader.read_stacked(names, own), sources._shared.parameters
            self._store.put(names, stacked, shared=shared if self._shared else None)
            return
        read = self._reader.read_all(sources)
        self._store.put(list(sources), read.own, shared=read.shared)

    def fill(self, names: Sequence[Hashable], tensors: Mapping[str, Sequence[Tensor]]) -> None:
        """Store many adapters from stacked tensors, in a few copies.

        Args:
            names: names that are not in the bank yet.
            tensors: a mapping from the name of each group to its tensors, in the order of the line and
                without the scaling by `alpha`, each with a leading axis as long as ``names``.

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
        """Copy the tensors of an adapter, by the name of the group; None gives zeros.

        They are in the order of the line and without the scaling by `alpha`, as `add` takes them.

        Raises:
            KeyError: the name is not in the bank.
        """
        found = self._store.gather([name])
        return {group: [tensor[0] for tensor in tensors] for group, tensors in found.items()}

    def __delitem__(self, name: Hashable) -> None:
        self._store.drop(name)

    def remove(self) -> None:
        """Take the bank off its model, which is restored; calling this again does nothing."""
        detach(self._handles)

    # Use

    @contextmanager
    def using(self, names: Names) -> Iterator[Bank]:
        """Let every row, or every token, of a batch use the adapter named for it, within this context.

        It works with generate(), whose copies of a row (beams, several sequences) use the row's adapter.
        The selection is local to the thread or asynchronous task that enters the context. Adapters that
        are replaced meanwhile take effect in the next context.

        Args:
            names: a name for each row, or None for rows without an adapter. Or a list of such names for each
                row, one for each token, if a row contains several requests; a tensor of integers does too.
                Such a context serves forwards of batches of this shape alone.

        Raises:
            KeyError: a name that is not in the bank.
            ValueError: no names, or lists of different lengths; in the model's forward, a batch that is not
                a multiple of the number of names, or that has not a token for each.
            TypeError: one text in place of several names.
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
            >>> with bank.using([["ann", "ann", None, None]]):  # two requests in one row
            ...     output = model(torch.tensor([[3, 14, 15, 9]]))
        """
        chosen = read_names(names)
        self._check_ready()
        tensors = self._shared.join(self._store.gather(chosen.names))
        with self._current.use(BatchTensors(tensors, chosen.layout, chosen.shape)):
            yield self

    @contextmanager
    def using_tensors(self, tensors: Mapping[str, Sequence[Tensor]]) -> Iterator[Bank]:
        """Let every row of a batch use tensors that are not in the bank, within this context.

        Gradients reach the tensors, and the `shared` parameters that require them. So adapters of many users
        can train in one batch, together with what they share or apart from it.

        Args:
            tensors: a mapping from the name of each group to its tensors, as `fill` takes them, in float32
                or float64 and with a leading axis of rows.

        Raises:
            ValueError: other groups or shapes than the bank's; in the model's forward, a batch that is not
                a multiple of the number of rows.
            RuntimeError: the bank was removed from its model.

        Example:
            >>> import lortalib
            >>> from transformers import BertConfig, BertModel
            >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, vocab_size=50,
            ...                              num_attention_heads=4, intermediate_size=64)).eval()
            >>> bank = lortalib.nn.bank(model, "cp", rank=2, shared=("in", "out"))
            >>> own = {"encoder": [torch.randn(2, *t.shape, requires_grad=True)
            ...                    for t in bank[None]["encoder"]]}
            >>> with bank.using_tensors(own):
            ...     model(torch.tensor([[3, 14], [15, 9]]))[0].square().sum().backward()
            >>> [tuple(tensor.grad.shape) for tensor in own["encoder"]]  # head, layer, matrix
            [(2, 4, 2), (2, 2, 2), (2, 4, 2)]
            >>> bank.fill(["ann", "bob"], own)
        """
        self._check_ready()
        rows = len(next(iter(tensors.get(self.groups[0].name, ())), ()))
        self._reader.check_shapes("the tensors do not fit the bank", tensors, (rows,))
        with self._current.use(BatchTensors(self._shared.join(tensors), EvenRows(rows), (rows,))):
            yield self

    def _check_ready(self) -> None:
        """Refuse a context in which the rows could not be what they are alone."""
        if not self._handles:
            raise RuntimeError("the bank was removed from its model; make one anew and update() it")
        if self._plan.config.acts_on == "stream":
            self._check_merged()

    def _check_merged(self) -> None:
        """Refuse rows on the stream that would meet a merged weight: their product belongs to neither."""
        sites = [site for group in self.groups for site in group.sites]
        own = {weight_name(site): site.path for site in sites}
        for name, adapter in adapters(self._model).items():
            for site in adapter.sites if adapter.merged else ():
                if weight_name(site) in own:
                    raise ValueError(
                        f"the bank acts on the stream that {site.path} reads or writes, and adapter "
                        f"{name!r} is merged into its weight; unmerge it first"
                    )
