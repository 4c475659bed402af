"""Puts an adapter on a model: plans it, checks the plan, makes the adapter and installs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .._kinds import FLAG, NAMES, takes
from ..decomp import Rank, StartLike
from ._adapter import Adapter
from ._adapters import check_name, install
from ._anatomy import MLP_ROLES, BlockRule, UnsupportedModelError
from ._bank import Bank, check_rows
from ._from_adapter import on_shared, start_from
from ._lora_words import explains_lora_words
from ._plan import Decomposition
from ._plan_model import plan
from ._targets import Targets
from ._task_lines import check_task_names
from ._tasks import TaskAdapter
from ._trained_modules import TrainedModules, find_modules
from ._verify import check_effect, verify


@explains_lora_words
@takes(train_also=NAMES, freeze=FLAG)
def apply(
    model: nn.Module,
    decomposition: Decomposition = "indscal",
    rank: Rank = 16,
    *,
    alpha: float = 1.0,
    dropout: float = 0.0,
    targets: Targets = "qkvo",
    layers: int | Iterable[int] | None = None,
    init: StartLike | Adapter = "invariant",
    gqa: str = "pool",
    acts_on: str | None = None,
    name: str = "default",
    train_also: Sequence[str] = (),
    share_residual: bool = False,
    shared: Iterable[str] | Adapter | Bank = (),
    tasks: Sequence[str] = (),
    rules: BlockRule | Sequence[BlockRule] = (),
    verify_with: Mapping[str, Any] | None = None,
    freeze: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """Put an adapter on a transformers model: one low-rank tensor for all its attention projections.

    The default format scored best for its size in the study (docs/quality.md): INDSCAL of rank 16 on the
    residual stream. LoRTA itself is ``"cp"``.

    The projections of one stack that have equal head counts and widths share one tensor
    T[layer, head, matrix, in, out]. ``in`` is the side of the residual stream, ``head`` and ``out`` are
    the other side, for readers of the stream (q, k, v) and writers (o) alike. Forward hooks add the
    updates; no module is replaced.

    Args:
        model: the model; it is changed in place, until ``adapter.remove()``.
        decomposition: a registered name (``"cp"``, ``"tucker"``, ``"tt"``, ...), a line of legs, a
            function such as ``lortalib.decomp.tt``, or any callable ``(shape, rank, ...)`` that
            returns a network of that shape.
        rank: as for `lortalib.decomp.network`.
        alpha: the update is ``alpha * T``. The initial values make the effect of the first step
            independent of the rank; only ``init="lorta"`` divides alpha by the rank.
        dropout: probability of dropping an input feature of the adapter in training.
        targets: letters out of ``"qkvo"`` (a letter that the model lacks is ignored), ``"mlp"``, ``"all"``
            (or ``"all-linear"``), a list of module names, paths or roles, one regular expression that whole
            paths match, or a predicate on an attention `Site`.
        layers: only these layers of each stack; all by default.
        init: ``"invariant"``, ``"lorta"`` (the published start), ``"normal"``, or a callable. Or an `Adapter`
            of the same networks, at a copy of whose values the new adapter starts, and so with its update;
            ``bank.adapter("ann")`` is one, and so is `lortalib.nn.read` of a folder.
        gqa: with grouped queries, ``"pool"`` (a key/value head takes the mean of its query heads'
            slices) or ``"split"`` (k and v have a tensor of their own).
        acts_on: ``"weights"``: the updates are added to the weights. ``"stream"``: the tensor is
            S[layer, matrix, in, out] over the residual stream; readers read ``x + x S`` and writers write
            ``y + y S``, so heads and the other side of each weight need no parameters. See docs/stream.md.
            The default is the stream for formats with one parameter on both sides (``"indscal"``,
            ``"rescal"``, a line with ``(tied)``), else the weights.
        name: name of the adapter on the model.
        train_also: modules that train as a whole with the adapter and are saved with it.
        share_residual: let the networks of one stack with equal width and rank, such as those of attention
            and MLP, share one factor for ``in``, the residual stream.
        shared: an adapter or a `Bank` with parameters marked ``(shared)``: the new adapter has frozen copies
            of these, and trains what is its own, from the start that ``init`` names. Or legs, such as
            ``("in", "out")``: the parameters that carry one of them are marked ``(shared)``, which matters to
            adapters and banks that take them from this one. The networks must be those of the other: the
            same decomposition, rank, targets.
        tasks: names of tasks, for a decomposition with the mode ``task``, such as ``"metatt_41d"``, ``"cp"``
            or a line of legs. The adapter is then a `TaskAdapter`, and a forward uses the task that
            ``adapter.using("sst2")`` chooses; see docs/tasks.md. Not with ``dropout``, ``shared`` or an
            adapter as ``init``.
        rules: rules that describe the attention blocks of a remote-code model; see `sites`.
        verify_with: example inputs of the model. One forward of the live model checks the plan of the
            attention before anything is changed (see `lortalib.nn.verify`). Networks of the MLP or on the
            stream are checked by their effect (see `lortalib.nn.check_effect`); if one has no effect, the
            adapter is removed again.
        freeze: whether all other parameters of the model stop requiring gradients.
        generator: source of randomness for the initial values.
        dtype: dtype of the factors; computation follows the model's dtype.

    Returns:
        The `Adapter`, which is active; with ``tasks`` a `TaskAdapter`.

    Raises:
        UnsupportedModelError: the model's attention was not found, or only in part.
        TypeError: an argument of another kind.
        ValueError: a bad argument, a name that is in use, targets that choose no projection, or a plan
            that the live model contradicts. The model is then unchanged.

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> lortalib.nn.apply(model, "cp", rank=2).count()
        100
    """
    model = check_name(model, name)
    sharing = None  # the adapter whose shared parameters the new one takes
    tasks = check_task_names(tasks)
    if tasks and (not isinstance(shared, (list, tuple, set, frozenset)) or shared):
        raise ValueError(
            "tasks= says itself what tasks have in common: the parameters without the leg 'task'. Leave out "
            "shared="
        )
    if tasks and isinstance(init, Adapter):
        raise ValueError(
            "init= is an adapter, and tasks= names tasks, which have no values of another to start at. Leave "
            "out one of the two; to go on with tasks that were trained, load their folder and add_task()"
        )
    if isinstance(shared, (Adapter, Bank)):
        sharing = shared.adapter(None) if isinstance(shared, Bank) else shared.snapshot()
        shared = ()
    if isinstance(init, Bank):
        raise ValueError("a bank has no single adapter to start from: use init=bank.adapter(name)")
    donor = init.snapshot() if isinstance(init, Adapter) else None
    start = "normal" if isinstance(init, Adapter) else init
    planned = plan(
        model,
        decomposition,
        rank,
        alpha=alpha,
        dropout=dropout,
        targets=targets,
        layers=layers,
        init=start,
        gqa=gqa,
        acts_on=acts_on,
        share_residual=share_residual,
        shared=shared,
        tasks=tasks,
        rules=rules,
        generator=generator,
        dtype=dtype,
    )
    if donor is not None:
        planned = start_from(planned, donor)
    if sharing is not None:
        planned = on_shared(planned, sharing, start if donor is None else None, generator)
    for site in planned.sites if planned.tasks else ():
        check_rows(model, site)
    paths = find_modules(model, train_also, (site.path for site in planned.sites))
    attention = [site for site in planned.sites if site.role not in MLP_ROLES]
    if verify_with is not None and attention and planned.config.acts_on == "weights":
        verify(model, verify_with, sites=attention).raise_for_disagreement()
    networks = dict(planned.networks)
    parts = name, planned.config, planned.groups, networks, TrainedModules(paths)
    adapter = TaskAdapter(*parts, planned.tasks) if planned.tasks else Adapter(*parts)
    install(adapter, model, active=True, freeze=freeze)
    if verify_with is not None:
        with adapter.using(adapter.tasks[0]) if isinstance(adapter, TaskAdapter) else nullcontext():
            _check_effects(adapter, verify_with)
    return adapter


def _check_effects(adapter: Adapter, example_inputs: Any) -> None:
    """Refuse an adapter if one of its networks has no effect. This covers the networks that `verify` cannot
    check: those of the MLP, and those on the stream, which have no heads."""
    groups = [
        group for group in adapter.groups if group.on_stream or set(group.roles) & set(MLP_ROLES)
    ]
    if not groups:
        return
    try:
        effects = check_effect(adapter, example_inputs)
        silent = [group.name for group in groups if not effects[group.name]]
        if silent:
            raise UnsupportedModelError(
                f"the networks {', '.join(silent)} change nothing of what the model computes for these "
                "inputs: the projections planned for them are not used"
            )
    except BaseException:
        adapter.remove()
        raise
