"""Sets the initial directions of an adapter from the gradient of the first batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._kinds import FUNCTION, GENERATOR, MAPPING, TEXT, Kind, takes
from ..decomp import network, start_along
from ._adapter import Adapter
from ._adapters import adapters, install
from ._tasks import refuse_tasks
from ._trained_modules import TrainedModules

_BATCHES = Kind(
    "batches, such as a list of mappings or a loader", lambda value: hasattr(value, "__iter__")
)


@takes(batches=_BATCHES, loss=FUNCTION.or_none, name=TEXT, generator=GENERATOR)
def align_to_gradient(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[Any], Tensor] | None = None,
    name: str = "default",
    generator: torch.Generator | None = None,
) -> None:
    """Align the parameters of an untrained adapter to the gradient of the loss.

    The function computes the gradient of the mean loss with respect to the tensor T of each network, and
    starts the network along it (see `lortalib.decomp.start_along`): the update stays zero and every
    parameter keeps its size, but its directions are no longer random. LoRA-GA (arXiv 2407.05000) does so
    for LoRA; for ``"lora_xs"``, whose sides are frozen, r * r parameters for each matrix then suffice. A
    few batches are enough. Meanwhile memory holds one float32 number for each entry of the adapted weights,
    as a step of full fine-tuning would.

    Args:
        model: a model with the adapter; its mode (train or eval) and its gradients stay unchanged.
        batches: batches of the training data; all are used, so cut a loader short with
            ``itertools.islice(loader, 4)``.
        loss: a function from a batch to the mean loss; by default ``model(**batch).loss``.
        name: name of the adapter.
        generator: source of the first guess of the directions; torch's global one by default.

    Raises:
        KeyError: no adapter has that name.
        ValueError: the adapter has been trained, has tasks, is merged or not active; its format has no
            directions along a tensor (CP, ring); networks share a parameter; there is no batch; or a gradient
            is zero or not finite. The adapter is then unchanged.

    Example:
        >>> import lortalib, torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> model = BertForSequenceClassification(BertConfig(
        ...     num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "lora_xs", rank=4)
        >>> batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}
        >>> lortalib.nn.align_to_gradient(model, [batch])
        >>> adapter.config.init, adapter.delta(adapter.sites[0]).abs().max().item()
        ('gradient', 0.0)
    """
    known = adapters(model)
    if name not in known:
        raise KeyError(
            f"no adapter is called {name!r}; the model has {', '.join(map(repr, known)) or 'none'}"
        )
    adapter = known[name]
    _check(adapter)
    gradients = _gradients(model, adapter, batches, loss or partial(_loss_of_model, model))
    found = []
    for group in adapter.groups:
        net, gradient = adapter.network(group), gradients[group.name]
        try:
            start = start_along(gradient, net.modes)
        except ValueError as error:
            raise ValueError(
                f"the gradient by the tensor of {group.name!r} is zero or not finite: does the loss "
                "depend on the model, and are the batches sound?"
            ) from error
        started = network(
            net.legs,
            net.shape,
            {**net.ranks, **net.vectors},
            init=start,
            generator=generator,
            device=gradient.device,
        )
        found.append((net, started))
    config = replace(adapter.config, init="gradient")
    pairs = [pair for net, new in found for pair in zip(net.stored, new.stored)]
    kept = [(own, own.detach().clone()) for own, _ in pairs]
    try:
        _copy(pairs)
    except BaseException:
        _copy(kept)
        raise
    adapter.config = config


def _loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a model of transformers computes itself."""
    MAPPING.check("a batch without loss=", batch)
    loss: Tensor = model(**batch).loss
    return loss


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first."""
    with torch.no_grad():
        for own, tensor in pairs:
            own.copy_(tensor)


def _check(adapter: Adapter) -> None:
    """Refuse an adapter that has been trained, or whose parameters cannot be aligned."""
    refuse_tasks(adapter, "aligning it")
    if adapter.merged or not adapter.active:
        state = "merged" if adapter.merged else "not active"
        raise ValueError(f"adapter {adapter.name!r} is {state}; unmerge and enable it to align it")
    owners: dict[int, str] = {}
    for group in adapter.groups:
        net = adapter.network(group)
        hashed = [net.legs.terms[k] for k, *_ in net.legs.tree(net.modes, net.legs.zero)]
        if any(term.of for term in hashed):
            raise ValueError(
                f"the parameters of {group.name!r} are hashed, so they cannot follow a gradient; align an "
                f"adapter of another format, in\n    {net.legs}"
            )
        if net.tensors[net.legs.zero].any():
            raise ValueError(
                f"adapter {adapter.name!r} has been trained, or did not start at zero; aligning it "
                "would lose that. Align right after apply, with an init whose update is zero"
            )
        for tensor in net.stored:
            if owners.setdefault(id(tensor), group.name) != group.name:
                raise ValueError(
                    f"the networks {owners[id(tensor)]!r} and {group.name!r} share a parameter "
                    "(share_residual=True), which cannot follow two gradients; apply without it"
                )


def _gradients(
    model: nn.Module, adapter: Adapter, batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """Compute the mean gradient with respect to each group's tensor.

    A network with a single parameter that carries every mode is T itself, so its gradient is that of T.
    """
    whole = _whole(model, adapter)
    try:
        install(whole, model, active=True, freeze=False)
        parameters = list(whole.parameters())
        total = [torch.zeros_like(parameter) for parameter in parameters]
        count = 0
        for batch in batches:
            with torch.enable_grad():
                found = torch.autograd.grad(_number(loss(batch)), parameters, allow_unused=True)
            for mean, gradient in zip(total, found):
                if gradient is not None:
                    mean += gradient
            count += 1
        if not count:
            raise ValueError("no batch was given; a loader that was read to its end gives none")
        return {group.name: mean / count for group, mean in zip(whole.groups, total)}
    finally:
        _take_off(whole)


def _take_off(whole: Adapter) -> None:
    """Remove the second adapter from its model, also if an interrupt stops the first attempt."""
    try:
        if whole.is_on_model:
            whole.remove()
    except BaseException:
        if whole.is_on_model:
            whole.remove()
        raise


def _number(loss: Any) -> Tensor:
    """Return the loss if it is one number with a gradient; refuse it otherwise."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else loss
        raise ValueError(
            f"the loss of a batch must be one number in a tensor; found {found!r}. Give labels with "
            "the batch, or a function as loss="
        )
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on what the adapter changes")
    return loss


def _whole(model: nn.Module, adapter: Adapter) -> Adapter:
    """Make a second adapter for the same sites whose networks are the tensors T themselves."""
    networks = {}
    for group in adapter.groups:
        net = adapter.network(group)
        device = net.stored[0].device
        line = " ".join(net.modes)
        networks[group.name] = network(line, net.shape, 1, device=device)
    config, name = replace(adapter.config, dropout=0.0), f"{adapter.name}_gradient"
    while name in adapters(model):
        name += "_"
    return Adapter(name, config, adapter.groups, networks, TrainedModules())
