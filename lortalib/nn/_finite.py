"""Refuses to merge an adapter whose numbers are missing or not finite."""

from __future__ import annotations

from ._adapter import Adapter
from ._sharded import is_finite


def check_finite(adapter: Adapter) -> None:
    """Refuse an adapter with a factor that is on the meta device, NaN or infinite.

    Raises:
        ValueError: the name of the factor.
    """
    for group in adapter.groups:
        for name, tensor in adapter.network(group).named_parameters():
            if tensor.is_meta:
                raise ValueError(
                    f"adapter {adapter.name!r} is on the meta device: it has no numbers to merge"
                )
            if not is_finite(tensor):
                raise ValueError(
                    f"factor {name!r} of network {group.name!r} holds NaN or infinity, so adapter "
                    f"{adapter.name!r} was not merged; nothing was changed"
                )
