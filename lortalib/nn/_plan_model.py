"""Plans the adapter of a model or of a configuration, or lists what a budget of parameters buys there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Union, overload

import torch
from torch import nn

from .._kinds import DEVICE, FLAG, GENERATOR, takes
from ..decomp import Rank, RankTable, StartLike
from ._anatomy import BlockRule, Site, check_experts, check_model, site_weight
from ._budget import budget_of_sites
from ._config import check_settings
from ._lora_words import explains_lora_words
from ._meta_model import as_model
from ._offloaded import execution_device
from ._plan import Decomposition, Device, Plan, check_whole, plan_sites
from ._targets import Targets, choose_sites, find_candidates
from ._task_lines import check_task_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: A model, or the configuration of one.
ModelLike = Union[nn.Module, "PreTrainedConfig"]


#: The rank where none is given.
_RANK = 16


@overload
def plan(
    model: ModelLike,
    decomposition: Decomposition | None = None,
    rank: Rank = 16,
    *,
    numbers: None = None,
    alpha: float = 1.0,
    dropout: float = 0.0,
    targets: Targets = "qkvo",
    layers: int | Iterable[int] | None = None,
    init: StartLike = "invariant",
    gqa: str = "pool",
    acts_on: str | None = None,
    share_residual: bool = False,
    shared: Iterable[str] = (),
    tasks: Sequence[str] = (),
    rules: BlockRule | Sequence[BlockRule] = (),
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Plan: ...


@overload
def plan(
    model: ModelLike,
    decomposition: str | Sequence[str] | None = None,
    *,
    numbers: int,
    targets: Targets = "qkvo",
    layers: int | Iterable[int] | None = None,
    gqa: str = "pool",
    acts_on: str | None = None,
    rules: BlockRule | Sequence[BlockRule] = (),
) -> RankTable: ...


@explains_lora_words
@takes(share_residual=FLAG, generator=GENERATOR, device=DEVICE)
def plan(  # type: ignore[misc]
    model: ModelLike,
    decomposition: Decomposition | Sequence[str] | None = None,
    rank: Rank = _RANK,
    *,
    numbers: int | None = None,
    alpha: float = 1.0,
    dropout: float = 0.0,
    targets: Targets = "qkvo",
    layers: int | Iterable[int] | None = None,
    init: StartLike = "invariant",
    gqa: str = "pool",
    acts_on: str | None = None,
    share_residual: bool = False,
    shared: Iterable[str] = (),
    tasks: Sequence[str] = (),
    rules: BlockRule | Sequence[BlockRule] = (),
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Plan | RankTable:
    """Plan the adapter that `apply` would put on a model, without changing the model.

    With ``numbers``, list instead the ranks of each format whose trainable parameters come closest to that
    number from below.

    Args:
        model: the model, also on the meta device, or its configuration, which needs no weights.
        decomposition: as for `apply`, like all further arguments except ``numbers`` and ``device``. With
            ``numbers`` a list of names and lines of legs, by default every registered format.
        rank: as for `apply`; not with ``numbers``.
        numbers: the largest number of trainable parameters.
        alpha: as for `apply`.
        dropout: as for `apply`.
        targets: as for `apply`.
        layers: as for `apply`.
        init: as for `apply`.
        gqa: as for `apply`.
        acts_on: as for `apply`.
        share_residual: as for `apply`; not with ``numbers``.
        shared: legs; the parameters that carry one are marked ``(shared)``; not with ``numbers``.
        tasks: as for `apply`; not with ``numbers``.
        rules: as for `apply`.
        generator: as for `apply`.
        dtype: as for `apply`.
        device: device of the networks, by default the device of the weights; ``"meta"`` makes parameters
            without values.

    Returns:
        `Plan`; with ``numbers`` a `RankTable`, the closest format first. Its ``refused`` says why a format
        has no row.

    Raises:
        UnsupportedModelError: the model's attention was not found, or only in part.
        TypeError: an argument of another kind.
        ValueError: a bad argument, or targets that choose no projection.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                     intermediate_size=64)
        >>> print(plan(BertModel(config), "cp", 2, device="meta"))
        Plan: cp, scaling 1
          stack    matrices  layers  heads  in  out  legs                                    ranks  parameters
          encoder  q k v o   2       4      32  8    in r, out r, head r, layer r, matrix r  2      100
          100 trainable parameters; LoRA of rank 2 on these 8 projections has 1,024
        >>> plan(config, ["cp", "tt", "indscal"], numbers=1000)
        format   rank             parameters
        cp       r=20             1,000
        indscal  r=25             1,000
        tt       a=8 b=8 c=8 d=8  960
    """
    model = check_model(as_model(model))
    check_settings(alpha, dropout, init, acts_on)
    tasks = check_task_names(tasks)
    chosen = choose_sites(find_candidates(model, targets, rules), targets, layers)
    check_experts(model, chosen)
    if numbers is not None:
        if rank != _RANK or share_residual or shared:
            raise ValueError(
                "numbers= finds the rank, of networks that share no factor: leave out rank, share_residual "
                "and shared"
            )
        if tasks:
            raise ValueError("numbers= finds the rank of tensors without tasks: leave out tasks")
        return budget_of_sites(chosen, numbers, decomposition, gqa, acts_on)
    check_whole(model, {site.path: site_weight(model, site) for site in chosen})
    return plan_sites(
        chosen,
        "indscal" if decomposition is None else decomposition,  # type: ignore[arg-type]
        rank,
        alpha=alpha,
        dropout=dropout,
        init=init,
        gqa=gqa,
        acts_on=acts_on,
        share_residual=share_residual,
        shared=shared,
        tasks=tasks,
        generator=generator,
        device=(lambda site: _device_of(model, site)) if device is None else device,
        dtype=dtype,
    )


def _device_of(model: nn.Module, site: Site) -> Device:
    return execution_device(model.get_submodule(site.path), site_weight(model, site))
