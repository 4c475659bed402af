"""Makes a bank on a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike

import torch
from torch import nn

from ..._kinds import DEVICE, DTYPE, PATH, Kind, is_integer, takes
from ...decomp import Network, Rank
from .._adapter import Adapter
from .._anatomy import BlockRule, check_model, site_weight
from .._plan import Decomposition, Plan, share_input_factor
from .._plan_model import plan
from .._targets import Targets
from .bank import Bank
from .file import read_folder
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
    _check_capacity(capacity)
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
    return _bank_of(model, planned, capacity, dtype, device, rules)


#: The kind of what a bank can be made for.
_SOURCE = Kind(
    "an Adapter, or the path of one that was saved",
    lambda value: isinstance(value, Adapter) or PATH.fits(value),
)


@takes(source=_SOURCE, dtype=DTYPE, device=DEVICE)
def bank_like(
    model: nn.Module,
    source: Adapter | str | PathLike[str],
    *,
    capacity: int = 64,
    rules: BlockRule | Sequence[BlockRule] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Bank:
    """Make an empty bank that an adapter fits, or that a saved bank can be loaded into.

    Args:
        model: the model, as for `bank`.
        source: an `Adapter` on any model of this shape, a folder that `Adapter.save`, PEFT's
            ``save_pretrained`` or `Bank.save` wrote, or a repository of the Hugging Face hub.
        capacity, rules, dtype, device: as for `bank`.
        revision: a branch, tag or commit of the repository; by default ``main``.
        token: a token of the hub; by default the one that ``hf auth login`` stored.
        subfolder: the folder in the repository, or below a local folder, that has the files.

    Returns:
        The empty `Bank`, whose lines, ranks and alpha are those of the source.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        AdapterFileError: a file is damaged, or its adapter does not fit the model.
        ValueError: an adapter of several tasks, or projections for which rows cannot differ; see `bank`.

    Example:
        >>> import lortalib, tempfile
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "tucker", rank=2, init="normal")
        >>> folder = adapter.save(tempfile.mkdtemp())
        >>> adapter.remove()
        >>> bank = lortalib.nn.bank_like(model, folder)
        >>> bank["ann"] = folder
        >>> str(bank.legs["encoder"]), len(bank)
        ('in p, out q, head s, layer t, matrix u, p q s t u', 1)
    """
    _check_capacity(capacity)
    model = check_model(model)
    if not isinstance(source, Adapter) or (revision, token, subfolder) != (None, None, None):
        source = read_folder(model, source, rules, revision, token, subfolder, of_bank=True)
    if source.tasks:
        raise ValueError(
            f"adapter {source.name!r} has the tasks {', '.join(map(repr, source.tasks))}, and the adapters "
            "of a bank have none: take one, as by adapter.task(name)"
        )
    return _bank_of(model, _plan_like(source), capacity, dtype, device, rules)


def _plan_like(adapter: Adapter) -> Plan:
    """Return the plan of an adapter like this one, whose parameters have no values."""
    networks = {group.name: _without_values(adapter.network(group)) for group in adapter.groups}
    config = replace(adapter.config, alpha=adapter.config.scaling, dropout=0.0, init="invariant")
    if config.share_residual:
        share_input_factor(adapter.groups, networks)
    return Plan(tuple(adapter.groups), networks, config)


def _without_values(network: Network) -> Network:
    own = [torch.empty_like(tensor, device="meta") for tensor in network.stored]
    return network.like([own[k] for k in network.legs.holders])


def _check_capacity(capacity: object) -> None:
    if not is_integer(capacity) or not 1 <= capacity < 2**62:  # type: ignore[operator]
        raise ValueError(f"capacity must be a positive integer; found {capacity!r}")


def _bank_of(
    model: nn.Module,
    planned: Plan,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
    rules: BlockRule | Sequence[BlockRule],
) -> Bank:
    """Make a bank of a plan; by default on the device of the model's weights."""
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
