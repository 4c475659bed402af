"""Holds the model that a bank is on."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._forward import Handle


class BankHome:
    """The model that a bank is on, and the handles of the bank's hooks there.

    A copy or a pickle of a bank alone is on no model, and leaves the model out. A hook on the model fills the
    home of a copy, so a bank that is copied with its model is on the copy.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found: nn.Module | None = model
        self.handles: list[Handle] = []

    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            RuntimeError: the bank is a copy without its model.
        """
        if self.found is None:
            raise RuntimeError(
                "the bank is a copy without its model: copy or pickle the two together, as (model, bank); or "
                "make a bank on a model and update() it from this one"
            )
        return self.found

    def __getstate__(self) -> dict[str, Any]:
        return {"found": None, "handles": []}
