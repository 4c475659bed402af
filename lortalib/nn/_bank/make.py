"""Makes a bank on a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..._kinds import DEVICE, DTYPE, is_integer, takes
from ...decomp import Rank
from .._anatomy import BlockRule, check_model, site_weight
from .._plan import Decomposition
from .._plan_model import plan
from .._targets import Targets
from .bank import Bank
from .hooks import check_rows


@takes(dtype=DTYPE, device=DEVICE)
def bank(
    model: nn.Module,
    decomposition: Decomposition = "indscal",
    rank: Rank = 16,
    *,
    capacity: int = 64,
    alpha: float = 1.0,
    targets: Targets = "qkvo",
    layers: int | Iterable[int] | None = None,
    gqa: str = "pool",
    acts_on: str | None = None,
    share_residual: bool = False,
    shared: Iterable[str] = (),
    rules: BlockRule | Sequence[BlockRule] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Bank:
    """Make a store of many adapters of one shape on a model, so that every row of a batch can use its own.

    Args:
        model: the model; no part of it is replaced. It has hooks until ``bank.remove()``.
        decomposition, rank, targets, layers, gqa, acts_on, rules: as for `apply`.
        capacity: the number of adapters to make room for; the room doubles when it is used up.
        alpha: the update is ``alpha * T`` for adapters given as bare tensors; an `Adapter` has its own
            scaling.
        share_residual: as for `apply`.
        shared: legs, such as ``("in", "out")``. All adapters have the parameters that carry one of them in
            common, as if the line marked these ``(shared)``; each adapter has the other parameters of its
            own. If ``in`` and ``out`` are shared, rows differ in a small middle only, and a batch of many
            adapters costs about as much as one of a single adapter. Shared parameters are drawn as by
            ``init="normal"``; the first adapters that an empty bank gets replace them by theirs.
        dtype: the dtype of the stored parameters: float64, float32, bfloat16, float16, float8_e5m2 or
            float8_e4m3fn. Pairs are computed in the wider of this dtype and the model's.
        device: the device of the stored parameters; by default that of the model's weights (main memory
            if these are on the meta device). Gathered tensors move to the model, so a bank can stay in
            main memory while the model is on a GPU.

    Returns:
        The empty `Bank`.

    Raises:
        UnsupportedModelError: the model's attention was not found, or not all of it.
        ValueError: a bad argument; or projections for which rows cannot differ: packed experts, weights
            read directly, and attention that puts time before batch. The model stays unchanged.

    Example:
        >>> import torch, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, vocab_size=50,
        ...                              num_attention_heads=4, intermediate_size=64)).eval()
        >>> bank = lortalib.nn.bank(model, "cp", rank=2)
        >>> for name in ("ann", "bob"):
        ...     adapter = lortalib.nn.apply(model, "cp", rank=2, init="normal")
        ...     bank[name] = adapter
        ...     adapter.remove()
        >>> with bank.using(["bob", None, "ann"]):
        ...     output = model(torch.tensor([[3, 14], [15, 9], [26, 5]]))
        >>> len(bank), bank.count()
        (2, 100)
    """
    if not is_integer(capacity) or not 1 <= capacity < 2**62:
        raise ValueError(f"capacity must be a positive integer; found {capacity!r}")
    model = check_model(model)
    planned = plan(
        model,
        decomposition,
        rank,
        alpha=alpha,
        targets=targets,
        layers=layers,
        gqa=gqa,
        acts_on=acts_on,
        share_residual=share_residual,
        shared=shared,
        rules=rules,
        device="meta",
    )
    for site in planned.sites:
        check_rows(model, site)
    if device is None:
        own = getattr(site_weight(model, planned.sites[0]), "device", None)
        device = "cpu" if own is None or own.type == "meta" else own
    return Bank(
        model,
        planned,
        capacity=int(capacity),
        dtype=dtype,
        device=torch.device(device),
        rules=rules,
    )
