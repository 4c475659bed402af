"""Makes parameter groups for an optimiser: the legs of a parameter decide its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from .._kinds import MAPPING, takes
from .._numbers import check_number
from ..decomp import Term
from ._adapter import ADAPTER, Adapter


@takes(adapter=ADAPTER, speeds=MAPPING.or_none)
def parameter_groups(
    adapter: Adapter,
    lr: float,
    *,
    speeds: Mapping[str, float] | None = None,
    modules_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Divide the trainable parameters of an adapter into parameter groups for a torch optimiser.

    Args:
        adapter: an adapter on a model.
        lr: learning rate of the tensor's parameters.
        speeds: factors of ``lr`` by leg (a mode or a bond). The learning rate of a parameter is ``lr`` times
            the factors of all its legs; a leg without a factor counts as 1. The name of a split mode stands
            for all its factors; ``"task"`` stands for the own parameters of tasks. A vector of hashed
            parameters has the factor of its own name, because several parameters with different legs may
            share it.
        modules_lr: learning rate of the modules that train as a whole (``train_also``); ``lr`` by default.
        weight_decay: weight decay of every group. Decay of one factor shrinks the whole tensor, so the
            default is 0.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name``. Each parameter is in one group, and no
        group is empty.

    Raises:
        TypeError: a rate, factor or decay is no number.
        ValueError: a rate or factor is not positive, the decay is negative, or no network has the leg.
        RuntimeError: the adapter is on no model.

    Example:
        >>> import lortalib, torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> model = BertForSequenceClassification(BertConfig(
        ...     num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "cp", rank=2, train_also=["classifier"])
        >>> groups = parameter_groups(adapter, 1e-2, speeds={"layer": 3, "head": 3}, modules_lr=5e-3)
        >>> [(group["name"], group["lr"], len(group["params"])) for group in groups]
        [('tensor', 0.01, 3), ('tensor x 3', 0.03, 2), ('modules', 0.005, 2)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    speeds = dict(speeds or {})
    modules_lr = lr if modules_lr is None else modules_lr
    for what, value in (("lr", lr), ("modules_lr", modules_lr), *speeds.items()):
        check_number(str(what), value, least=0, above=True)
    check_number("weight_decay", weight_decay, least=0)
    lines = [(adapter.tensor(group).legs, adapter.networks_of(group)) for group in adapter.groups]
    legs = {leg: None for line, _ in lines for term in line.terms for leg in _legs(term)}
    unknown = [leg for leg in speeds if leg not in legs]
    if unknown:
        hashed = any(term.of for line, _ in lines for term in line.terms)
        raise ValueError(
            f"no network has the leg {unknown[0]!r}; there are {', '.join(legs)}"
            + " (hashed parameters have the rate of their vector)" * hashed
        )
    by_speed: dict[float, dict[int, Any]] = {}
    for line, networks in lines:
        factors = [
            math.prod(speeds.get(leg, 1.0) for leg in _legs(line.terms[owner]))
            for owner in line.owners
        ]
        for network in networks:
            for factor, tensor in zip(factors, network.stored):
                if tensor.requires_grad:
                    by_speed.setdefault(factor, {})[id(tensor)] = tensor
    modules = _modules(adapter.model, adapter.trained_modules.paths)
    found = [
        ("tensor" if factor == 1 else f"tensor x {factor:g}", lr * factor, list(params.values()))
        for factor, params in by_speed.items()
    ]
    return [
        {"params": params, "lr": rate, "weight_decay": weight_decay, "name": name}
        for name, rate, params in (*found, ("modules", modules_lr, modules))
        if params
    ]


def _legs(term: Term) -> tuple[str, ...]:
    """Return the names of the factors that a parameter's learning rate is multiplied by."""
    if term.of:
        return (term.of,)
    modes = (leg.partition(".")[0] for leg in term.legs)  # of a factor of a mode, both count
    return tuple(dict.fromkeys((*term.legs, *modes)))


def _modules(model: nn.Module, paths: tuple[str, ...]) -> list[nn.Parameter]:
    """Return the trainable parameters of these modules, each once."""
    found = {
        id(parameter): parameter
        for path in paths
        for parameter in model.get_submodule(path).parameters()
        if parameter.requires_grad
    }
    return list(found.values())
