"""What one projection adds: a forward hook, or a weight where the forward is passed by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.nn.utils.parametrize import (
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
)
from torch.utils.hooks import RemovableHandle

from ..decomp import Cut
from ._names import stored
from ._site import Site

if TYPE_CHECKING:
    from ._adapter import Adapter


def low_rank(x: Tensor, pair: Cut, writer: bool, scaling: float) -> Tensor:
    """``scaling * x @ dW^T`` without dW, computed in the dtype of ``x``.

    Args:
        x: (..., in) for a reader, (..., head*out) for a writer.
        pair: A (p, in) and B (head*out, p); dW is ``B @ A`` for a reader, its transpose for a writer.
        writer: whether the residual stream is the output.
        scaling: factor of the update, applied in the p-dimensional space.

    Returns:
        (..., head*out) for a reader, (..., in) for a writer.
    """
    a, b = (factor.to(x.device, x.dtype) for factor in pair)
    first, second = (b.mT, a.mT) if writer else (a, b)
    return linear(linear(x, first) * scaling, second)


def dense_share(dense: Tensor, site: Site) -> Tensor:
    """dW of one site in the shape in which its module's whole weight is stored; rows of other sites
    are zero.

    Args:
        dense: (head*out, in), or (expert, head*out, in) for packed experts.
        site: where it belongs.
    """
    if site.rows is not None:
        whole = dense.new_zeros(*dense.shape[:-2], site.fused or 0, site.width)
        dense = whole.index_copy(-2, site.rows.index(dense.device), dense)
    return dense if site.writer == site.transposed else dense.mT


class Share:
    """A forward hook: adds the shares of the sites of one module, while the adapter is active.

    An object and not a closure, so that it follows deepcopy and pickle. It holds no parameter: these
    belong to the adapter, and nothing of one forward outlives it.
    """

    def __init__(self, adapter: Adapter, sites: Sequence[Site]) -> None:
        self.adapter = adapter
        self.sites = tuple(sites)
        rows = [site.rows.index() for site in self.sites if site.rows is not None]
        self.rows = torch.cat(rows) if rows else None
        if rows and torch.equal(self.rows, torch.arange(self.sites[0].fused or 0)):  # type: ignore[arg-type]
            self.rows = None  # the shares side by side are the whole output

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Torch's forward hook: the projection's output with the shares added."""
        adapter = self.adapter
        if not adapter.active:
            return None
        x = dropout(args[0], adapter.dropout, adapter.training)
        shares = [
            low_rank(x, adapter.pair(site), site.writer, adapter.scaling) for site in self.sites
        ]
        share = shares[0] if len(shares) == 1 else torch.cat(shares, -1)
        if isinstance(output, tuple):  # quantised layers return their scale beside the output
            return (self._add(output[0], share), *output[1:])
        return self._add(output, share)

    def _add(self, output: Tensor, share: Tensor) -> Tensor:
        share = share.to(output.dtype)
        if self.rows is None:
            return output + share
        return output.index_add(-1, self.rows.to(output.device), share)


class WeightShare(nn.Module):
    """A parametrization: adds the dense updates to a weight that is read directly.

    For the few modules whose forward is never called, such as the projections of
    torch.nn.MultiheadAttention. One stands on a weight for all adapters of the model.
    """

    def __init__(self, order: Iterable[str]) -> None:
        super().__init__()
        self.shares: list[tuple[Adapter, Site]] = []
        self.order = tuple(order)  # of the module's parameters before the weight was parametrized

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the updates of the active adapters."""
        for adapter, site in self.shares:
            if adapter.active:
                weight = weight + adapter.delta(site).to(weight.device, weight.dtype)
        return weight


def stored_weight(model: nn.Module, site: Site) -> Any:
    """The weight of a site's module as it is stored, without a parametrization."""
    return stored(model.get_submodule(site.path), site.parameter)


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Let every site of the adapter take its share."""
    for path, sites in by_module(adapter.sites):
        module = model.get_submodule(path)
        if not sites[0].bypassed:
            # Torch counts hooks from 0 in every process, so those of an unpickled module can have
            # numbers that new ones are about to get.
            while RemovableHandle.next_id in module._forward_hooks:
                RemovableHandle.next_id += 1
            module.register_forward_hook(Share(adapter, sites))
            continue
        for site in sites:
            if not is_parametrized(module, site.parameter):
                _parametrize(module, site.parameter)
            _weight_share(module, site).shares.append((adapter, site))


def detach(model: nn.Module, adapter: Adapter) -> None:
    """Take back what `attach` did."""
    for path, sites in by_module(adapter.sites):
        module = model.get_submodule(path)
        hooks = module._forward_hooks
        for key in [k for k, hook in hooks.items() if _is_share_of(hook, adapter)]:
            del hooks[key]
        for site in sites:
            if not site.bypassed or not is_parametrized(module, site.parameter):
                continue
            share = _weight_share(module, site)
            share.shares = [(owner, part) for owner, part in share.shares if owner is not adapter]
            if not share.shares:
                remove_parametrizations(module, site.parameter, leave_parametrized=False)
                for name in share.order:
                    if name in module._parameters:
                        module._parameters[name] = module._parameters.pop(name)


def by_module(sites: Iterable[Site]) -> Iterator[tuple[str, list[Site]]]:
    """Every module that takes shares, by path, with its sites."""
    members: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        for path in (site.path, *site.also):
            members[path].append(site)
    yield from members.items()


def _parametrize(module: nn.Module, name: str) -> None:
    order = list(module._parameters)
    if is_parametrized(module):
        first = next(iter(module.parametrizations.values()))[0]  # type: ignore[union-attr, operator]
        order = list(first.order)
    register_parametrization(module, name, WeightShare(order), unsafe=True)


def _weight_share(module: nn.Module, site: Site) -> WeightShare:
    share = module.parametrizations[site.parameter][0]  # type: ignore[index, union-attr]
    assert isinstance(share, WeightShare)
    return share


def _is_share_of(hook: object, adapter: Adapter) -> bool:
    return isinstance(hook, Share) and hook.adapter is adapter
