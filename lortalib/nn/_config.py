"""How an adapter is asked for, and what no adapter can be made with."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch

from ..decomp import StartLike, get_format, get_start


@dataclass(frozen=True)
class AdapterConfig:
    """How an adapter was asked for; written to its file.

    Attributes:
        decomposition: name of the format, or the line of legs.
        alpha: what the user gave.
        scaling: the factor of the tensor in the update, made from alpha.
        dropout: probability of dropping an input feature of the adapter in training.
        gqa: ``"pool"`` or ``"split"``.
        init: name of the start.
        share_residual: whether networks of one stack have one factor for ``in``.
        acts_on: ``"weights"``, to which T is added, or ``"stream"``, which S changes.
    """

    decomposition: str
    alpha: float
    scaling: float
    dropout: float
    gqa: str
    init: str
    share_residual: bool = False
    acts_on: str = "weights"


def check_settings(
    alpha: object, dropout: object, init: StartLike, acts_on: str | None = None
) -> None:
    """Refuse what no adapter can be made with.

    Raises:
        ValueError: an alpha that is zero or not a finite float32, a dropout outside [0, 1), an unknown
            init, an unknown place to act on.
    """
    if acts_on is not None:
        check_acts_on(acts_on)
    if not isinstance(dropout, Real) or not 0 <= float(dropout) < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; found {dropout!r}")
    check_alpha(alpha)
    get_start(init)


def check_alpha(alpha: object) -> None:
    """Refuse a scaling that makes no update, or none that float32 can hold.

    Raises:
        ValueError: an alpha that is zero, or beyond the range of float32.
    """
    largest = torch.finfo(torch.float32).max
    if not isinstance(alpha, Real) or not 0 < abs(alpha) <= largest:  # type: ignore[operator]
        raise ValueError(f"alpha must be a finite number other than 0; found {alpha!r}")


def check_acts_on(acts_on: object) -> None:
    """Refuse what is no place for a tensor to act on.

    Raises:
        ValueError: neither ``"weights"`` nor ``"stream"``.
    """
    if acts_on not in ("weights", "stream"):
        raise ValueError(f"acts_on must be 'weights' or 'stream'; found {acts_on!r}")


def settle_acts_on(decomposition: object, acts_on: str | None) -> str:
    """What a tensor acts on if nobody says: the stream, where one parameter is on both ``in`` and ``out``.

    Args:
        decomposition: as for `apply`.
        acts_on: what the user said; None for nothing.

    Example:
        >>> settle_acts_on("cp", None), settle_acts_on("indscal", None), settle_acts_on("cp", "stream")
        ('weights', 'stream', 'stream')
    """
    if acts_on is not None:
        return acts_on
    made = get_format(decomposition) if isinstance(decomposition, str) else decomposition
    return "stream" if getattr(made, "symmetric", False) else "weights"
