"""Follows the heads of an attention call: back from queries, keys and values to their projections, and
from the output on to the projection that reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from .._anatomy import Site, named_modules
from .recorder import AttentionCall, AttentionRecorder
from .running import arguments, evaluating, frozen, with_plain_attention

#: The largest number of gradient entries of attention weights that are computed at once.
_MOST_NUMBERS = 2**26


@dataclass(eq=False)
class Forward:
    """The record of one forward.

    Attributes:
        calls: the attention calls, in order.
        leaves: for each projection that reads the residual stream, by `weight_name`, a zero that was added
            to each of its output features.
        flows: for each call, the paths of the projections that read its output, each with a pair of
            tensors from which follows which input feature depends on which head.
        written: the paths of the output projections that were called.
    """

    calls: list[AttentionCall]
    leaves: dict[str, Tensor]
    flows: list[list[tuple[str, Tensor, Tensor]]]
    written: set[str]


@dataclass(eq=False)
class Trace:
    """The features that feed some heads of one call, and the features that these heads feed.

    Attributes:
        sources: for ``"q"``, ``"k"`` and ``"v"`` and for each leaf behind them, the strength with which
            each feature feeds each traced head: (n, features), not negative.
        sinks: for each output projection, by path, the strength with which each head feeds each of
            its input features: (n, features).
    """

    sources: dict[str, dict[str, Tensor]]
    sinks: dict[str, Tensor]


def weight_name(site: Site) -> str:
    """Return the name of the weight of a site; sites of one fused projection share it."""
    return f"{site.path}.{site.parameter}"


def record_forward(model: nn.Module, inputs: Any, sites: Sequence[Site]) -> Forward:
    """Run one forward of the live model and record it. The model is unchanged afterwards.

    Args:
        model: the model.
        inputs: its inputs: a mapping of keyword arguments, a tuple or list of positional ones, or a
            single one.
        sites: the projections to watch.

    Raises:
        Exception: any error of the model's own forward.
    """
    leaves: dict[str, Tensor] = {}
    written: list[tuple[str, Tensor]] = []
    with ExitStack() as stack:
        for context in (
            evaluating(model),
            frozen(model),
            with_plain_attention(model),
            parametrize.cached(),
        ):
            stack.enter_context(context)
        direct: dict[str, Tensor] = {}
        replaced: dict[str, Tensor] = {}
        for site in {weight_name(site): site for site in sites}.values():
            owners = (model.get_submodule(path) for path in (site.path, *site.tied_paths))
            modules = list(dict.fromkeys(owners))
            if not site.weight_read_directly:
                hook = (
                    CaptureInputHook(site.path, written)
                    if site.writer
                    else AddLeafHook(weight_name(site), leaves)
                )
                for module in modules:
                    stack.callback(module.register_forward_hook(hook).remove)
            elif site.writer:
                direct[site.path] = getattr(modules[0], site.parameter)
            else:
                name, weight = _stored(modules[0], site)
                leaves[weight_name(site)], replaced[name] = _with_leaf(weight, site.transposed)
        taps = AttentionRecorder(
            {module: path for path, module in named_modules(model).items()}, direct
        )
        args, kwargs = arguments(inputs)
        with taps:
            functional_call(model, replaced, args, kwargs)
    written += taps.written
    flows = _flows(taps.calls, written)
    return Forward(taps.calls, leaves, flows, {path for path, _ in written})


def trace_heads(forward: Forward, number: int, units: Tensor, queries: Tensor) -> Trace:
    """Follow some heads of a call to the projections.

    Args:
        forward: the record that `record_forward` returned.
        number: the number of the call.
        units: (n,), the units of the call to follow.
        queries: (n, queries), the weight of each query.

    Raises:
        RuntimeError: torch cannot differentiate what the model did.
    """
    call = forward.calls[number]
    back = BatchedGradients(max(1, _MOST_NUMBERS // call.weights.numel()), forward.leaves)
    units = units.to(call.gate.device)
    mix = queries.to(call.gate.device, call.weights.dtype)[:, :, None]
    sources: dict[str, dict[str, Tensor]] = {"q": {}, "k": {}, "v": {}}
    weights = (call.weights[units] * mix).sum(1)
    operands = _operands(call)
    reached = back.gradients(weights, [tensor for tensor, _ in operands], _seeds(weights))
    for (tensor, role), seeds in zip(operands, reached):
        if seeds is not None:
            _add(sources[role], back.to_leaves(tensor, seeds))
    mixed = (call.mixed[units] * mix).sum(1)
    _add(sources["v"], back.to_leaves(mixed, _seeds(mixed)))
    sinks: dict[str, Tensor] = {}
    for path, probe, response in forward.flows[number]:
        gates = (response[units] * mix[..., 0]).sum(1)
        (features,) = back.gradients(gates, [probe], _seeds(gates))
        if features is not None and features.any():
            _add(sinks, {path: features.flatten(1, -2).abs().sum(1)})
    return Trace(sources, sinks)


def whole_units(call: AttentionCall, most: int) -> tuple[Tensor, Tensor]:
    """Choose the first units with all of their queries, as arguments of `trace_heads`."""
    n_units, n_queries = call.gate.shape
    return torch.arange(min(n_units, most)), _random(n_queries).expand(min(n_units, most), -1)


def single_queries(call: AttentionCall, most: int) -> tuple[Tensor, Tensor]:
    """Choose every unit with every single query, because a model can store heads among the queries."""
    n_units, n_queries = call.gate.shape
    pairs = torch.cartesian_prod(torch.arange(n_queries), torch.arange(n_units))[:most]
    return pairs[:, 1], torch.eye(n_queries)[pairs[:, 0]]


class AddLeafHook:
    """A forward hook that adds a leaf to the output features of a projection, times a random number for
    each token: without it, a change that is equal for all keys would leave the softmax as it is."""

    def __init__(self, name: str, leaves: dict[str, Tensor]) -> None:
        self.name, self.leaves = name, leaves

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # a quantised projection also returns its scale
            return (self(module, args, output[0]), *output[1:])
        if self.name not in self.leaves:
            self.leaves[self.name] = _zeros(output, output.shape[-1])
        weight_name = self.leaves[self.name]
        noise = torch.randn(output.shape[:-1], dtype=weight_name.dtype, device=weight_name.device)
        return (output + weight_name * noise[..., None]).to(output.dtype)


class CaptureInputHook:
    """A forward hook that collects the input of an output projection and cuts the graph behind it."""

    def __init__(self, path: str, written: list[tuple[str, Tensor]]) -> None:
        self.path, self.written = path, written

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self.written.append((self.path, args[0]))
        if isinstance(output, tuple):
            return (output[0].detach(), *output[1:])
        return output.detach()


def _stored(module: nn.Module, site: Site) -> tuple[str, Tensor]:
    """Return the name and the value of the parameter that stores a site's weight."""
    name = site.parameter
    if parametrize.is_parametrized(module, name):
        name = f"parametrizations.{name}.original"
    return f"{site.path}.{name}", module.get_parameter(name)


def _with_leaf(weight: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Make a leaf for each output feature, and the weight with the leaf added to it."""
    out, reads = (1, 0) if transposed else (0, 1)
    zeros = _zeros(weight, weight.shape[out])
    rank_one = torch.outer(zeros, torch.randn_like(zeros[:1].expand(weight.shape[reads])))
    joined = weight.detach() + (rank_one.mT if transposed else rank_one)
    return zeros, joined.to(weight.dtype)


def _zeros(like: Tensor, size: int) -> Tensor:
    """Make zeros of at least single precision, so that sums over tokens do not cancel by rounding."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(size, dtype=dtype, device=like.device, requires_grad=True)


def _flows(
    calls: Sequence[AttentionCall], written: Iterable[tuple[str, Tensor]]
) -> list[list[tuple[str, Tensor, Tensor]]]:
    """Find for each call the projections that read it.

    The gradient of ``<probe, x>`` with respect to the gates is linear in the probe; differentiated once
    more, it gives the features of x that each gate reaches."""
    flows: list[list[tuple[str, Tensor, Tensor]]] = [[] for _ in calls]
    gates = [call.gate for call in calls]
    for path, x in written:
        if not x.requires_grad or not gates:
            continue
        probe = torch.zeros_like(x, requires_grad=True)
        responses = torch.autograd.grad(
            x, gates, probe, create_graph=True, allow_unused=True, retain_graph=True
        )
        for flow, response in zip(flows, responses):
            if response is not None:
                flow.append((path, probe, response))
    return flows


def _operands(call: AttentionCall) -> list[tuple[Tensor, str]]:
    """List the operands of the scores, each with its role ``"q"`` or ``"k"``."""
    operands: dict[int, tuple[Tensor, str]] = {}
    for pair in call.pairs:
        one, other = pair.one, pair.other
        flipped = not pair.ordered and _is_flipped(call, one, other)
        for tensor, role in ((one, "qk"[flipped]), (other, "kq"[flipped])):
            if tensor.requires_grad:
                operands.setdefault(id(tensor), (tensor, role))
    return list(operands.values())


def _is_flipped(call: AttentionCall, one: Tensor, other: Tensor) -> bool:
    """Return True if the second operand holds the queries.

    Two queries have different vectors in the operand of queries, and the same in that of keys. A single
    query has one vector in the operand of queries, and in that of keys one for each token it attends to.
    """
    chosen = [tensor for tensor in (one, other) if tensor.requires_grad]
    if not chosen or not call.weights.requires_grad:
        return False
    n_queries = call.weights.shape[1]
    back = BatchedGradients(2, {})
    shared = [0] * len(chosen)
    for query in {1 % n_queries, n_queries // 2, n_queries - 1}:
        weights = call.weights[0, [query - 1, query] if n_queries > 1 else [query]]
        for k, gradients in enumerate(back.gradients(weights, chosen, _seeds(weights))):
            if gradients is not None:
                shared[k] += int((gradients.flatten(1) != 0).all(0).sum())
    if len(chosen) == 2:
        return shared[0] > shared[1]
    return n_queries > 1 and (chosen[0] is one) == (shared[0] > 0)


class BatchedGradients:
    """Computes many gradients at once if torch can, else one after another."""

    def __init__(self, at_once: int, leaves: Mapping[str, Tensor]) -> None:
        self.at_once, self.leaves = at_once, leaves

    def to_leaves(self, tensor: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """Compute |gradient| of each leaf that the tensor depends on, as (n, features)."""
        found = self.gradients(tensor, list(self.leaves.values()), seeds)
        return {name: g.abs() for name, g in zip(self.leaves, found) if g is not None and g.any()}

    def gradients(
        self, output: Tensor, inputs: Sequence[Tensor], seeds: Tensor
    ) -> list[Tensor | None]:
        """Compute the gradients (n, *input.shape) of each input for the seeds (n, *output.shape)."""
        if not inputs or not output.requires_grad:
            return [None] * len(inputs)
        parts = [self._some(output, inputs, part) for part in seeds.split(self.at_once)]
        return [None if column[0] is None else torch.cat(column) for column in zip(*parts)]

    def _some(self, output: Tensor, inputs: Sequence[Tensor], seeds: Tensor) -> list[Any]:
        try:
            return list(_grad(output, inputs, seeds, is_grads_batched=True))
        except RuntimeError:
            rows = [_grad(output, inputs, seed) for seed in seeds]
            return [None if c[0] is None else torch.stack(c) for c in zip(*rows)]


def _add(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, tensor in more.items():
        total[name] = total[name] + tensor if name in total else tensor


def _seeds(tensor: Tensor) -> Tensor:
    """Make seeds (n, *shape) for a tensor (n, ...): one part at a time, each in a random direction."""
    alone = torch.eye(len(tensor)).reshape(len(tensor), len(tensor), *[1] * (tensor.dim() - 1))
    return (alone * _random(*tensor.shape)).to(tensor.device, tensor.dtype)


def _random(*shape: int) -> Tensor:
    """Make random numbers that are not small, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(shape, generator=generator) + 0.5
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -size, size)


def _grad(output: Tensor, inputs: Sequence[Tensor], seeds: Tensor, **options: bool) -> Any:
    return torch.autograd.grad(
        output, inputs, seeds, retain_graph=True, allow_unused=True, **options
    )
