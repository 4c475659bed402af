"""Changes the ranks of an adapter in training, together with the state of its optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .._kinds import GENERATOR, OPTIMIZER, takes
from .._torch import forget_compiled, has_gradient_hooks
from ..decomp import Network, Rank, RankChange, grow, prune
from ._adapter import ADAPTER, Adapter
from ._optimizer_state import carried_over
from ._sharded import is_divided, is_zero_parameter, processes
from ._tasks import refuse_tasks


@takes(adapter=ADAPTER, optimizer=OPTIMIZER, generator=GENERATOR)
def change_rank(
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    rank: Rank,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Give a training adapter other ranks; the optimiser goes on with its state in the new coordinates.

    Bonds with larger ranks are pruned (`lortalib.decomp.prune`), those with smaller ones grow
    (`lortalib.decomp.grow`), which changes no update. Call this after ``optimizer.step()``: the parameters
    are replaced, and gradients of the old ones are dropped. The networks stay the same modules. The optimiser
    has the new parameters where it had the old ones, so a scheduler of learning rates needs no change.

    Args:
        adapter: an adapter on a model.
        optimizer: an optimiser of torch with all parameters of the adapter that train, or a wrapper with its
            ``state`` and ``param_groups``.
        rank: ranks as for `apply`, or a mapping with some bonds; networks that lack a bond are refused. Ranks
            larger than the modes of a network can fill are reduced.
        generator: the source of randomness for new directions; by default torch's global one.

    Returns:
        For each network the relative error of its tensor, which pruning made.

    Raises:
        ValueError: ranks that a network cannot have (see `lortalib.decomp.prune`); an adapter that is merged,
            shares a factor between its networks, or has tasks; parameters that are divided over processes or
            have hooks; an optimiser that lacks parameters of the adapter, or with a state of which it is not
            known how it follows.
        RuntimeError: the adapter is on no model; several processes train; a checkpointed forward waits for
            its backward. Adapter and optimiser are unchanged after any error.

    Example:
        >>> import lortalib, torch
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "cp", rank=4)
        >>> optimizer = torch.optim.AdamW(lortalib.nn.parameter_groups(adapter, 1e-2))
        >>> change_rank(adapter, optimizer, 6)
        {'encoder': 0.0}
        >>> adapter.count()
        300
    """
    check_changeable(adapter, optimizer)
    parameters: dict[int, Tensor] = {}  # the new one by the identity of the old one
    states: dict[Tensor, dict[str, Any]] = dict(optimizer.state)
    swaps: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    errors = {}
    for group in adapter.groups:
        network = adapter.network(group)
        changes = changes_of(network, rank, generator)
        errors[group.name] = changes[0].error
        if not [bond for change in changes for maps in change.maps for bond in maps]:
            continue
        other = changes[-1].network
        for position, old in enumerate(network.stored):
            if id(old) in parameters:
                continue
            new = other.stored[position].requires_grad_(old.requires_grad)
            parameters[id(old)] = new
            if old in states:
                states[new] = carried_over(states.pop(old), changes, position)
        swaps.append((vars(network), {"_parameters": other._parameters, "sizes": other.sizes}))
    for each in optimizer.param_groups:
        swaps.append((each, {"params": [parameters.get(id(p), p) for p in each["params"]]}))
    contents = [(old, {**old, **new}) for old, new in swaps] + [(optimizer.state, states)]
    with ExitStack() as undo:
        undo.callback(_plan_again, adapter)
        for dictionary, content in contents:
            undo.callback(_fill, dictionary, dict(dictionary))
            _fill(dictionary, content)
        _plan_again(adapter)
        undo.pop_all()
    return errors


def changes_of(
    network: Network, rank: Rank, generator: torch.Generator | None
) -> tuple[RankChange, RankChange]:
    """Prune a network to ranks and grow it to them."""
    pruned = prune(network, rank)
    return pruned, grow(pruned.network, rank, generator=generator)


def check_changeable(adapter: Adapter, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an adapter whose parameters cannot be replaced now, or an optimiser without them.

    Raises:
        ValueError, RuntimeError: as for `change_rank`.
    """
    adapter.require_host()
    refuse_tasks(adapter, "another rank")
    if adapter.merged:
        raise ValueError(
            f"adapter {adapter.name!r} is merged and does not train; call unmerge() first"
        )
    networks = {group.name: adapter.network(group) for group in adapter.groups}
    owners: dict[int, str] = {}
    for name, network in networks.items():
        for tensor in network.stored:
            if owners.setdefault(id(tensor), name) != name:
                raise ValueError(
                    f"the networks {owners[id(tensor)]!r} and {name!r} share a parameter (share_residual), "
                    "whose coordinates cannot follow both; apply the adapter without share_residual"
                )
            _check_parameter(tensor)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {id(p) for p in adapter.networks.parameters() if p.requires_grad}
    if not trained <= held:
        raise ValueError(
            f"the optimiser lacks {len(trained - held)} of the {len(trained)} parameters of adapter "
            f"{adapter.name!r} that train, and another one would go on with the old ones; make one from "
            "lortalib.nn.parameter_groups(adapter, lr) after the adapter was applied, or freeze what does "
            "not train"
        )
    if processes() > 1:
        raise RuntimeError(
            "several processes train, and what averages their gradients keeps the old parameters; train in "
            "one process while the rank changes: save the adapter, load it there, go on, save it again"
        )
    if adapter.remembered.is_waiting:
        raise RuntimeError(
            "a checkpointed forward waits for its backward, which runs the forward again with the old ranks; "
            "call backward() first, or drop what the forward returned"
        )


def _check_parameter(tensor: Tensor) -> None:
    """Refuse a parameter that is not whole here, or that other code waits for."""
    if is_divided(tensor) or is_zero_parameter(tensor):
        raise ValueError(
            "FSDP or DeepSpeed divides the parameters over processes and keeps their shapes; change the rank "
            "before the model is divided"
        )
    if tensor.is_meta:
        raise ValueError("the parameters are on the meta device and have no numbers")
    if has_gradient_hooks(tensor):
        raise ValueError(
            "a parameter of the adapter has hooks for its gradient, which a new parameter would lack; remove "
            "them first and register them again on adapter.parameters()"
        )


def _fill(dictionary: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    """Give a dictionary this content; what it has besides goes last."""
    dictionary.update(content)
    for key in [key for key in dictionary if key not in content]:
        del dictionary[key]


def _plan_again(adapter: Adapter) -> None:
    """Forget everything that was computed from the old parameters."""
    adapter.scope.forget()
    for source in adapter.sources:
        source.plan_again()
    forget_compiled()
