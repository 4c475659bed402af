"""Defines the adapters that requests can name, and the versions of each."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Iterator
from itertools import count
from typing import Any, NamedTuple

from ..nn import Adapter, Bank


class Version(NamedTuple):
    """The name in the bank of an adapter that was added or replaced; no name of a file is equal to one."""

    name: str
    number: int

    def __repr__(self) -> str:
        return repr(self.name)  # what errors of the bank show


class Catalogue:
    """The adapters that requests can name; a request keeps the one that it began with.

    The bank stores each version of an adapter, and drops a version that was replaced or deleted when its
    last request is done. Every method may be called from any thread.

    Args:
        bank: a bank. Its adapters can be named at once, an integer as its text; from now on, they change
            through the catalogue only.

    Raises:
        ValueError: an integer and a text are the same name.

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> bank = lortalib.nn.bank(model, "cp", rank=2)
        >>> bank["ann"] = bank[None]
        >>> adapters = Catalogue(bank)
        >>> begun = adapters.acquire("ann")
        >>> adapters.put("ann", bank[None])
        >>> list(adapters), len(bank)  # the old version has a user
        (['ann'], 2)
        >>> adapters.release(begun)
        >>> len(bank)
        1
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._numbers = count()
        self._current: dict[str, Hashable] = {}
        for name in bank:
            if str(name) in self._current:
                raise ValueError(
                    f"the bank has the names {name!r} and {self._current[str(name)]!r}, which requests "
                    "cannot tell apart; rename one"
                )
            self._current[str(name)] = name
        # The catalogue is a user of each version too.
        self._users: Counter[Hashable] = Counter(self._current.values())
        self._lock = threading.Lock()

    def put(self, name: str, source: Any) -> None:
        """Add or replace an adapter.

        Args:
            name: its name.
            source: as for `Bank.add`, whose errors this raises.
        """
        version = Version(name, next(self._numbers))
        self.bank.add(version, source)
        with self._lock:
            old = self._current.get(name)
            self._current[name], self._users[version] = version, 1
        if old is not None:
            self.release(old)

    def delete(self, name: str) -> None:
        """Delete an adapter.

        Args:
            name: its name.

        Raises:
            KeyError: there is none of this name.
        """
        with self._lock:
            version = self._current.pop(name)
        self.release(version)

    def acquire(self, name: str) -> Hashable:
        """Return the name in the bank of an adapter's current version, and keep it until `release`.

        Args:
            name: the adapter's name.

        Raises:
            KeyError: there is none of this name.
        """
        with self._lock:
            version = self._current[name]
            self._users[version] += 1
            return version

    def release(self, version: Hashable) -> None:
        """Let one user of a version go; the last one drops it from the bank.

        Args:
            version: what `acquire` returned.
        """
        with self._lock:
            self._users[version] -= 1
            if not self._users[version]:
                del self._users[version], self.bank[version]

    def adapter(self, name: str) -> Adapter:
        """Copy an adapter out.

        Args:
            name: its name.

        Raises:
            KeyError: there is none of this name.
        """
        version = self.acquire(name)
        try:
            return self.bank.adapter(version)
        finally:
            self.release(version)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._current))

    def __len__(self) -> int:
        return len(self._current)
