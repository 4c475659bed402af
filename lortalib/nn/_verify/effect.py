"""Checks that an adapter has an effect: perturbs each of its networks and compares the model's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..._kinds import takes
from ..._numbers import check_number
from ...decomp import Network
from .._adapter import ADAPTER, Adapter
from .running import arguments, evaluating

#: Sizes of the perturbation, tried in turn, because low precision rounds small ones away.
_SIZES = (0.01, 1.0, 100.0)


@takes(adapter=ADAPTER)
def check_effect(
    adapter: Adapter, example_inputs: Any, *, tolerance: float = 0.0
) -> dict[str, bool]:
    """Check that every network of an adapter changes the output of the model.

    In each network in turn, the parameter that starts at zero is moved at random, first by a small
    amount, then further. The model runs in evaluation mode, without gradients, with the same random
    numbers each time. Afterwards, model and adapter are restored bit for bit.

    Args:
        adapter: an active adapter, not merged.
        example_inputs: the inputs of the model: a mapping of keyword arguments, a tuple or list of
            positional ones, or a single one.
        tolerance: the smallest change of an output entry that counts.

    Returns:
        For each group, by name, whether some tensor of the output changed. If not, the update of this
        group is lost on its way (or these inputs do not reach it, as an image does not reach a text
        tower): do not train such an adapter.

    Raises:
        ValueError: the adapter is merged or not active, so that its networks take no part.
        Exception: any error of the model's own forward.

    Example:
        >>> import lortalib, torch
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, vocab_size=50,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "cp", rank=2)
        >>> check_effect(adapter, torch.tensor([[3, 14, 15, 9]]))
        {'encoder': True}
    """
    check_number("tolerance", tolerance, least=0, infinite=True)
    if adapter.merged or not adapter.active:
        state, remedy = ("merged", "unmerge") if adapter.merged else ("not active", "enable")
        raise ValueError(
            f"adapter {adapter.name!r} is {state}, so its networks take no part in the forward; call "
            f"adapter.{remedy}() first"
        )
    model = adapter.model
    with evaluating(model), torch.no_grad():
        before = _outputs(model, example_inputs)
        found = {}
        for group in adapter.groups:
            network = adapter.network(group)
            found[group.name] = any(
                _differ(before, _perturbed(model, network, size, example_inputs), tolerance)
                for size in _SIZES
            )
        return found


def _perturbed(model: nn.Module, network: Network, size: float, inputs: Any) -> list[Tensor]:
    """Return the outputs while one parameter of the network is moved."""
    parameter = network.stored[network.legs.zero if network.legs.zeroable else 0]
    kept = parameter.detach().clone()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(parameter.shape, generator=generator)
    try:
        parameter.add_(noise.to(parameter.device, parameter.dtype), alpha=size)
        return _outputs(model, inputs)
    finally:
        parameter.copy_(kept)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Run the model with fixed random numbers; copy all floating-point tensors of its output."""
    torch.manual_seed(0)
    args, kwargs = arguments(inputs)
    return [tensor.clone() for tensor in _floating(model(*args, **kwargs), set())]


def _floating(tree: Any, seen: set[int]) -> Iterator[Tensor]:
    """Find floating-point tensors in nested containers and in attributes of other objects, such as caches."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield tree
        return
    if (
        tree is None
        or isinstance(tree, (str, bytes, int, float, type, nn.Module))
        or id(tree) in seen
    ):
        return
    seen.add(id(tree))
    if isinstance(tree, Mapping):
        items = list(tree.values())
    elif isinstance(tree, (tuple, list)):
        items = list(tree)
    else:
        items = list(getattr(tree, "__dict__", {}).values())
    for item in items:
        yield from _floating(item, seen)


def _differ(before: list[Tensor], after: list[Tensor], tolerance: float) -> bool:
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return True
    return any(_distance(a, b) > tolerance for a, b in zip(before, after))


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference: 0 if both are the same infinity or NaN, infinite if only one is."""
    wide = torch.promote_types(one.dtype, torch.float32)
    one, other = one.to(wide), other.to(wide)
    same = (one == other) | (one.isnan() & other.isnan())
    difference = (one - other).abs().masked_fill(same, 0)
    difference = difference.nan_to_num(nan=float("inf"), posinf=float("inf"))
    return difference.max().item() if difference.numel() else 0.0
