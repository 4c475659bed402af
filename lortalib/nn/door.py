"""What a door to the library is built on, beside `lortalib.nn.apply`, the bank, PEFT and the command line.

A door plans (`plan`, or `plan_sites` for sites that it finds itself), makes an `Adapter` of the plan, and
lets modules add its updates: `ModuleUpdate` is what one module adds, ``update(x, y)``; `watch_forwards`
marks where forwards begin and end, so that the low-rank pairs of all layers are made once in each.

Example:
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
    ...                              intermediate_size=64)).eval()
    >>> planned = plan(model, "cp", 2, init="normal")
    >>> adapter = make_adapter("default", planned)
    >>> handles = list(watch_forwards(model, adapter.scope, adapter.groups))
    >>> path, sites = next(by_module(adapter.sites))
    >>> update = ModuleUpdate(adapter, sites)
    >>> x = torch.ones(1, 3, 32)
    >>> update(x, torch.zeros(1, 3, 32)).shape
    torch.Size([1, 3, 32])
    >>> for handle in handles:
    ...     handle.remove()
"""

from __future__ import annotations

from ._adapter import Adapter
from ._anatomy import MLP_ROLES, linear_sites, understood_sites
from ._config import check_settings
from ._files import lora_config
from ._forward import (
    Handle,
    ModuleUpdate,
    Pair,
    add_update,
    by_module,
    detach,
    may_write_output,
    watch_forwards,
)
from ._group import group_sites
from ._plan import Plan, check_whole, make_network, plan, plan_sites
from ._targets import choose_sites, find_candidates
from ._trained_modules import TrainedModules, Values

__all__ = [
    "MLP_ROLES",
    "Handle",
    "ModuleUpdate",
    "Pair",
    "Plan",
    "TrainedModules",
    "Values",
    "add_update",
    "by_module",
    "check_settings",
    "check_whole",
    "choose_sites",
    "detach",
    "find_candidates",
    "group_sites",
    "linear_sites",
    "lora_config",
    "make_adapter",
    "make_network",
    "may_write_output",
    "plan",
    "plan_sites",
    "understood_sites",
    "watch_forwards",
]


def make_adapter(
    name: str, planned: Plan, trained_modules: TrainedModules | None = None
) -> Adapter:
    """The adapter of a plan, on no model yet.

    Args:
        name: its name.
        planned: what `plan` or `plan_sites` returned.
        trained_modules: modules that train as a whole with it; none by default.
    """
    networks = dict(planned.networks)
    trained = trained_modules or TrainedModules()
    return Adapter(name, planned.config, planned.groups, networks, trained)
