"""Collects the functions that further doors to the library use, such as PEFT and the command line.

A door is an interface that puts adapters on models in its own way. It takes four steps:

1. Plan: `plan` finds the sites of a model itself; `plan_sites` takes sites that the door found with
   `understood_sites` and `linear_sites`. `check_settings` and `check_whole` refuse bad input first.
2. Make: `make_adapter` makes the `Adapter` of a plan; the door registers it as a submodule of its choice.
3. Update: `by_module` lists the modules with their sites, and a `ModuleUpdate` adds the update of one module:
   ``update(x, y)``. x and y are the module's input and output, or, for a tensor on the stream, one of the
   two twice, as `Place` says. `may_write_output` tells whether y may be changed in place.
4. Watch: `watch_forwards` marks where forwards begin and end, so that each forward makes the low-rank pairs
   of all layers once. `detach` removes these hooks.

Example:
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
    ...                              intermediate_size=64)).eval()
    >>> adapter = make_adapter("default", plan(model, "cp", 2, init="normal"))
    >>> handles = list(watch_forwards(model, adapter.scope, adapter.groups))
    >>> updates = {path: ModuleUpdate(adapter, sites) for path, sites in by_module(adapter.sites)}
    >>> path, update = next(iter(updates.items()))
    >>> x, y = torch.ones(1, 3, 32), torch.zeros(1, 3, 32)
    >>> torch.allclose(update(x, y), x @ adapter.delta(path).T, atol=1e-6)
    True
    >>> detach(handles)
"""

from __future__ import annotations

from ._adapter import Adapter
from ._anatomy import MLP_ROLES, SiteList, check_stored, linear_sites, understood_sites
from ._config import check_settings
from ._files import Difference, compare_updates, describe_for_peft, lora_config
from ._forward import (
    Handle,
    ModuleUpdate,
    Pair,
    Place,
    add_update,
    by_module,
    detach,
    may_write_output,
    watch_forwards,
    without_bias,
)
from ._hub import HubPlace, each_place
from ._lora_words import LORA_WORDS
from ._meta_model import meta_model, model_class
from ._offloaded import execution_device
from ._plan import Plan, check_whole, plan_sites
from ._plan_model import plan
from ._sharded import divide_again, divided_like, is_divided, is_finite
from ._targets import are_letters, choose_sites, find_candidates
from ._trained_modules import TrainedModules, Values

__all__ = [
    "LORA_WORDS",
    "MLP_ROLES",
    "Difference",
    "Handle",
    "HubPlace",
    "ModuleUpdate",
    "Pair",
    "Place",
    "Plan",
    "SiteList",
    "Values",
    "add_update",
    "are_letters",
    "by_module",
    "check_settings",
    "check_stored",
    "check_whole",
    "choose_sites",
    "compare_updates",
    "describe_for_peft",
    "detach",
    "divide_again",
    "divided_like",
    "each_place",
    "execution_device",
    "find_candidates",
    "is_divided",
    "is_finite",
    "linear_sites",
    "lora_config",
    "make_adapter",
    "may_write_output",
    "meta_model",
    "model_class",
    "plan",
    "plan_sites",
    "understood_sites",
    "watch_forwards",
    "without_bias",
]


def make_adapter(name: str, planned: Plan) -> Adapter:
    """Make the adapter of a plan; it is on no model yet.

    Args:
        name: name of the adapter.
        planned: the result of `plan` or `plan_sites`.
    """
    return Adapter(name, planned.config, planned.groups, dict(planned.networks), TrainedModules())
