"""What an adapter asks of that which carries it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ._anatomy import Site


class Host(Protocol):
    """Where an adapter lives: what it asks of the model that carries it."""

    @property
    def model(self) -> nn.Module:
        """The model."""

    def base_weight(self, site: Site) -> Tensor:
        """A weight as it is without anything merged into it."""

    def bring_back(self, adapter: Any) -> None:
        """Let the modules that train with an adapter stay where they compute, if accelerate offloads them."""

    def prepare_files(self, adapter: Any) -> None:
        """Make ready what goes into a file, or refuse to write one."""

    def enable(self, adapter: Any) -> None:
        """See `Adapter.enable`."""

    def disable(self, adapter: Any) -> None:
        """See `Adapter.disable`."""

    def merge(self, adapter: Any) -> None:
        """See `Adapter.merge`."""

    def unmerge(self, adapter: Any) -> None:
        """See `Adapter.unmerge`."""

    def remove(self, adapter: Any, merged: bool) -> None:
        """See `Adapter.remove`."""
