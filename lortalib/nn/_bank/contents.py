"""Defines the contents of a bank: adapters under names, and the parameters that they share."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..._kinds import MAPPING, Kind, are, takes
from ...decomp import Legs
from .._adapter import Adapter
from .._anatomy import BlockRule
from .._group import Group
from .._plan import Plan
from .file import read_folder
from .home import BankHome
from .shared import SharedParameters, check_same_marks
from .source import Source, SourceReader
from .store import Store


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


#: The kinds of names and sources.
NAME = Kind("a name, which is hashable", _is_hashable)
LIST_OF_NAMES = Kind("a list of names, which are hashable", are(_is_hashable))
SOURCES = Kind(
    "a mapping from names to adapters, folders or tensors, an adapter with tasks, or a bank",
    lambda value: (
        isinstance(value, (Mapping, BankContents))
        or bool(isinstance(value, Adapter) and value.tasks)
    ),
)


class BankContents:
    """The adapters that a bank stores; `Bank` lets the rows of a batch use them."""

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
        self._home = BankHome(model)
        self._plan = plan
        self._rules = rules
        self._shared = SharedParameters(plan.networks, device, dtype)
        self._reader = SourceReader(self._home, plan, self._shared, rules, dtype, device)
        keys = self._reader.keys
        shapes = {
            key: shape
            for group in keys
            for key, shape in zip(keys[group], self._reader.shapes[group], strict=True)
        }
        self._store = Store(shapes, keys, capacity, dtype, device, self._shared)

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
        model = self._home.found
        place = "no model" if model is None else type(model).__name__
        return (
            f"Bank on {place}: {len(self):,} adapters of {self.count():,} trainable "
            f"parameters in {self.dtype}, {self.nbytes / 2**20:,.1f} MiB, room for {self.capacity:,}"
            + f", {sum(p.numel() for p in self._shared.distinct):,} shared" * bool(self._shared)
            + f" ({lines})"
        )

    # Adding and reading

    @takes(name=NAME)
    def add(
        self,
        name: Hashable,
        source: Source,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
    ) -> None:
        """Store an adapter; one with the same name is replaced.

        Args:
            name: any hashable name but None.
            source: an `Adapter` (on any model of this shape), a folder that one was saved to, a repository of
                the Hugging Face hub, or a mapping from the name of each group to its own tensors (not those
                that all adapters share), in the order of the line and without the scaling by `alpha`.
            revision: a branch, tag or commit of the repository; by default ``main``.
            token: a token of the hub; by default the one that ``hf auth login`` stored.
            subfolder: the folder in the repository, or below a local folder, that has the files.

        Raises:
            ValueError: the source has other groups, legs or shapes than the bank, has trained modules,
                has values that are not finite in the bank's dtype, or has other shared parameters than the
                adapters in the bank. An empty bank takes its shared parameters from the source.
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
        if (revision, token, subfolder) != (None, None, None):
            source = read_folder(self._home.model, source, self._rules, revision, token, subfolder)
        self.update({name: source})

    @takes(sources=SOURCES)
    def update(self, sources: Mapping[Hashable, Source] | Adapter | BankContents) -> None:
        """Store several adapters, replacing adapters of the same names. If one is refused, none is stored.

        Args:
            sources: a mapping from names to sources, as `add` takes them; or an adapter with tasks, each of
                which becomes an adapter of its name; or another bank of this shape, whose adapters make the
                same updates in this bank.

        Raises:
            ValueError, TypeError, FileNotFoundError, AdapterFileError: as for `add`.

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
        if isinstance(sources, BankContents):
            self._reader.check_alike("the other bank", sources.groups, sources._reader.legs)
            check_same_marks("the other bank", sources._reader.legs, self._reader.legs)
            theirs = sources._store.moment()
            own = self._reader.scaled(theirs.own, sources.alpha)
            stacked = self._reader.read_stacked(theirs.names, own)
            shared = {group: self._shared.shared(group, ts) for group, ts in theirs.base.items()}
            self._shared.check_fits(shared, "the other bank")
            self._store.put(theirs.names, stacked, shared=shared if self._shared else None)
            return
        if isinstance(sources, Adapter):
            read = self._reader.read_tasks(sources)
            self._store.put(sources.tasks, read.own, shared=read.shared)
            return
        read = self._reader.read_all(sources)
        self._store.put(list(sources), read.own, shared=read.shared)

    @takes(names=LIST_OF_NAMES, tensors=MAPPING)
    def fill(self, names: Sequence[Hashable], tensors: Mapping[str, Sequence[Tensor]]) -> None:
        """Store many adapters from stacked tensors, in a few copies.

        Args:
            names: names that are not in the bank yet.
            tensors: a mapping from the name of each group to its own tensors, in the order of the line and
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

    @takes(name=NAME)
    def __getitem__(self, name: Hashable) -> dict[str, list[Tensor]]:
        """Copy an adapter's own tensors, by the name of the group; None gives zeros.

        They are in the order of the line and without the scaling by `alpha`, as `add` takes them.

        Raises:
            KeyError: the name is not in the bank.
        """
        found = self._store.gather([name])
        return {group: [tensor[0] for tensor in tensors] for group, tensors in found.items()}

    @takes(name=NAME)
    def __delitem__(self, name: Hashable) -> None:
        self._store.drop(name)
