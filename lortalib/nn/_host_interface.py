"""Defines the interface that an adapter needs from its host."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from ._anatomy import Site
from ._forward import Places


class Host(Protocol):
    """The host of an adapter: the calls that reach the model and its other adapters."""

    @property
    def model(self) -> nn.Module:
        """The model that the adapter is on."""

    def base_weight(self, site: Site) -> Tensor:
        """Return the base's weight of a site, without any merged update."""

    def changed_base(self) -> list[str]:
        """List the tensors of the base that have changed, whose values no file of an adapter contains."""

    def bring_back(self, adapter: Any) -> None:
        """Bring the modules that train with an adapter back from accelerate's offloading."""

    def places(self, adapter: Any) -> Places | None:
        """Return the places of the modules that an adapter updates, which have its hooks."""

    def prepare_files(self, adapter: Any) -> None:
        """Prepare the parameters for a file, or refuse to write one."""

    def enable(self, adapter: Any) -> None:
        """Switch an adapter on, as `Adapter.enable` describes."""

    def disable(self, adapter: Any) -> None:
        """Switch an adapter off, as `Adapter.disable` describes."""

    def disabled(self, adapter: Any) -> AbstractContextManager[None]:
        """Switch an adapter off within a context, as `Adapter.disabled` describes."""

    def merge(self, adapter: Any) -> None:
        """Merge an adapter into the weights, as `Adapter.merge` describes."""

    def unmerge(self, adapter: Any) -> None:
        """Take an adapter out of the weights, as `Adapter.unmerge` describes."""

    def remove(self, adapter: Any, merged: bool) -> None:
        """Remove an adapter from the model, as `Adapter.remove` describes."""
