"""Defines the store of many adapters on one model, from which every row of a batch can use its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..._kinds import MAPPING, takes
from .._anatomy import BlockRule
from .._forward import EvenRows, detach
from .._plan import Plan
from .._recompute_guard import guard, never
from .bank_files import BankFiles
from .batch import BatchTensors, CurrentBatch, row_pairs
from .chosen import Names, read_names
from .hooks import attach_rows, check_unmerged


class Bank(BankFiles):
    """Stores many adapters of one shape on a model, so that every row of a batch can use its own.

    Each parameter of the tensor networks has one more leg, ``adapter``, unless all adapters share it. The
    rows of a batch gather their slices, and the updates of all rows are batched products, however many
    adapters there are. If the parameters for ``in`` and ``out`` are shared, x is multiplied by one A for
    all rows, a row's own numbers stand in a small map between the two sides, and one B writes the result.
    `lortalib.nn.bank` makes a bank.

    Tensors go in and come out without the scaling by `alpha`, which the forward applies:
    ``bank["y"] = bank["x"]`` makes two equal adapters. An `Adapter`, its folder and another bank have
    a scaling of their own, which is converted to this bank's.

    Several threads can add, replace and remove adapters at any time: a running batch keeps the tensors
    that it gathered. A call that raises, also because of an interrupt, leaves the bank unchanged.

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                              intermediate_size=64))
        >>> bank = lortalib.nn.bank(model, "cp", rank=2)
        >>> bank["ann"] = bank[None]  # zeros: it changes nothing
        >>> len(bank), "ann" in bank, bank.count(), bank.capacity
        (1, True, 100, 64)
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
        super().__init__(model, plan, capacity=capacity, dtype=dtype, device=device, rules=rules)
        for network in plan.networks.values():
            network.place_index(device)  # the plan's networks are on the meta device
        networks = [plan.networks[group.name] for group in plan.groups]
        self._current = CurrentBatch(
            [
                row_pairs(group, net, self.alpha, [term.shared for term in net.legs.terms])
                for group, net in zip(plan.groups, networks)
            ]
        )
        attach_rows(model, self._current, self._home.handles, self._home)

    def remove(self) -> None:
        """Take the bank off its model, which is restored; calling this again does nothing."""
        paths = [
            path for group in self.groups for s in group.sites for path in (s.path, *s.tied_paths)
        ]
        if self._home.handles:
            model = self._home.model
            added = self._current.remembered.added()
            guard(model, map(model.get_submodule, paths), added, never)
        detach(self._home.handles)

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
        tensors = self._store.snapshot(chosen.names)
        with self._current.use(BatchTensors(tensors, chosen.layout, chosen.shape)):
            yield self

    @takes(tensors=MAPPING)
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
        first = next(iter(tensors.get(self.groups[0].name, ())), None)
        rows = len(first) if isinstance(first, Tensor) and first.dim() else 0
        self._reader.check_shapes("the tensors do not fit the bank", tensors, (rows,))
        if not rows:
            raise ValueError(
                "using_tensors() needs tensors with a leading axis of one or more rows; found 0 rows"
            )
        with self._current.use(BatchTensors(self._store.joined(tensors), EvenRows(rows), (rows,))):
            yield self

    def _check_ready(self) -> None:
        """Refuse a context in which the rows could not be what they are alone."""
        model = self._home.model
        if not self._home.handles:
            raise RuntimeError("the bank was removed from its model; make one anew and update() it")
        if self._plan.config.acts_on == "stream":
            check_unmerged(model, [site for group in self.groups for site in group.sites])
