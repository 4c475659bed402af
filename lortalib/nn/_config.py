"""Defines the settings of an adapter, and refuses settings that no adapter can have."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch

from ..decomp import StartLike, get_format, get_start


@dataclass(frozen=True)
class AdapterConfig:
    """The settings that an adapter was made with; its file contains them.

    Attributes:
        decomposition: name of the format, or the line of legs.
        alpha: the alpha that the user gave.
        scaling: the number that the tensor is multiplied by to give the update, computed from alpha.
        dropout: probability of dropping an input feature of the adapter in training.
        gqa: ``"pool"`` or ``"split"``.
        init: name of the initialization.
        share_residual: whether networks of one stack share one factor for ``in``.
        acts_on: ``"weights"`` (T is added to the weights) or ``"stream"`` (S acts on the residual stream).

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                              intermediate_size=64))
        >>> config = lortalib.nn.apply(model, "cp", rank=2, alpha=0.5).config
        >>> config.decomposition, config.alpha, config.init, config.acts_on
        ('cp', 0.5, 'invariant', 'weights')
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
    """Refuse settings that no adapter can have.

    Raises:
        ValueError: alpha is zero or not a finite float32, dropout is outside [0, 1), or init or acts_on is
            unknown.
    """
    if acts_on is not None:
        check_acts_on(acts_on)
    if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0 <= float(dropout) < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; found {dropout!r}")
    check_alpha(alpha)
    get_start(init)


def check_alpha(alpha: object) -> None:
    """Refuse an alpha that is zero, and so makes no update, or that float32 cannot hold.

    Raises:
        ValueError: alpha is zero, or beyond the range of float32.
    """
    largest = torch.finfo(torch.float32).max
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 < abs(alpha) <= largest:  # type: ignore[operator]
        raise ValueError(f"alpha must be a finite number other than 0; found {alpha!r}")


def check_legs(shared: object) -> None:
    """Refuse a value of shared that lists no legs.

    Raises:
        ValueError: the value is no list, tuple or set of texts.
    """
    listed = isinstance(shared, (list, tuple, set, frozenset))
    if not listed or not all(isinstance(leg, str) for leg in shared):  # type: ignore[attr-defined]
        raise ValueError(f"shared must list legs, such as ('in', 'out'); found {shared!r}")


def check_acts_on(acts_on: object) -> None:
    """Refuse an unknown value of acts_on.

    Raises:
        ValueError: the value is neither ``"weights"`` nor ``"stream"``.
    """
    if acts_on not in ("weights", "stream"):
        raise ValueError(f"acts_on must be 'weights' or 'stream'; found {acts_on!r}")


def choose_acts_on(decomposition: object, acts_on: str | None) -> str:
    """Choose what a tensor acts on: by default the stream if one parameter is on both ``in`` and ``out``.

    Args:
        decomposition: as for `apply`.
        acts_on: the choice of the user; None for the default.

    Example:
        >>> choose_acts_on("cp", None), choose_acts_on("indscal", None), choose_acts_on("cp", "stream")
        ('weights', 'stream', 'stream')
    """
    if acts_on is not None:
        return acts_on
    made = get_format(decomposition) if isinstance(decomposition, str) else decomposition
    return "stream" if getattr(made, "symmetric", False) else "weights"
