"""Makes the low-rank pair of every module that an adapter updates, in the form that LoRA stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .._adapter import Adapter
from .._adapters import host_of
from .._anatomy import Site, check_model, named_modules
from .._base_weights import BaseWeights
from .._forward import ModuleUpdate, Place, by_module
from .tensors import plain

#: PEFT's name for the output projection of torch's own attention, which it wraps together with it.
OUTPUT = "base_layer.out_proj"


def lora_pairs(
    adapter: Adapter, model: nn.Module | None = None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Compute the update of every module as a low-rank pair.

    Args:
        adapter: an adapter, also one without a model.
        model: the model whose weights a tensor on the stream acts through, if the adapter is on none;
            nothing may be merged into them.

    Yields:
        The name of the module, A (p, features read) and B (features written, p), both float32.
        ``B @ A`` is the whole change of its weight, as torch.nn.Linear stores it. p is the rank of the
        cut; if the parts of a fused projection have different A, it is the sum of their ranks.

    Raises:
        ValueError: weights that LoRA has no pair for (packed experts, weights read directly), factors
            on the meta device, or a tensor on the stream without a model.
    """
    _check(adapter)
    weights = _weights(adapter, model)
    if any(tensor.is_meta for tensor in adapter.networks.parameters()):
        raise ValueError(f"adapter {adapter.name!r} is on the meta device: it has no numbers")
    adapter = adapter.snapshot()
    with torch.no_grad():
        for path, sites in by_module(adapter.sites):
            update = ModuleUpdate(adapter, sites)
            first, second = update.pair(torch.float32)
            if update.place is not Place.BESIDE:
                weight = plain(weights(sites[0])).to(first)
                weight = weight.mT if sites[0].transposed else weight
                if update.place is Place.INPUT:
                    second = second @ weight.mT
                else:
                    first = first @ weight
            yield path, first, second.mT
        for path in _attentions(adapter):  # PEFT adapts the output projection too
            width = next(site.width for site in adapter.sites if site.path == path)
            zeros = torch.zeros(1, width)
            yield f"{path}.{OUTPUT}", zeros, zeros.mT


def _weights(adapter: Adapter, model: nn.Module | None) -> Callable[[Site], Tensor]:
    """Return a function that finds the base's weight at a site."""
    if adapter.is_on_model or adapter.config.acts_on == "weights":
        return adapter.base_weight  # never called for an adapter on the weights
    if model is None:
        raise ValueError(
            f"adapter {adapter.name!r} acts on the stream, so a LoRA of it needs the weights of its model: "
            "load it onto the model, or give the model, as model= or --model"
        )
    model = check_model(model)
    paths = named_modules(model)
    lost = [site.path for site in adapter.sites if site.path not in paths]
    if lost:
        raise ValueError(
            f"adapter {adapter.name!r} does not fit {type(model).__name__}, which has no module "
            f"{lost[0]!r}"
        )
    host = host_of(model)
    return host.base_weight if host is not None else BaseWeights(model).base


def _check(adapter: Adapter) -> None:
    """Refuse weights for which programs read a LoRA file in different ways."""
    around = _attentions(adapter)
    for site in adapter.sites:
        owner, _, last = site.path.rpartition(".")
        if site.experts:
            what = "packs experts; a LoRA file has no pair for it"
        elif last == "out_proj" and owner in around:
            what = "is torch.nn.MultiheadAttention's, to which PEFT 0.21 adds a pair twice"
        elif site.weight_read_directly and site.path not in around:
            what = "is read without its module being called; a LoRA file has no pair for it"
        else:
            continue
        raise ValueError(
            f"{site.path}.{site.parameter} {what}. Merge the adapter instead (merge(), then save "
            "the model), or leave these targets out"
        )


def _attentions(adapter: Adapter) -> dict[str, None]:
    """Return the paths of torch.nn.MultiheadAttention modules whose q, k, v are adapted."""
    return dict.fromkeys(s.path for s in adapter.sites if s.parameter == "in_proj_weight")
