"""What one projection adds: a forward hook, or a weight where the forward is passed by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.nn.utils.parametrize import (
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
)
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from ..decomp._contract import is_tracing
from ._groups import Group
from ._lowrank import Reads, add
from ._names import original_weight
from ._site import Site

if TYPE_CHECKING:
    from ._adapter import Adapter
    from ._factors import Factors

#: Modules that return a tensor of their own in every forward.
_FRESH = (nn.Linear, Conv1D)


def as_stored(dense: Tensor, site: Site) -> Tensor:
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


class Part(NamedTuple):
    """What one module takes of one network.

    Attributes:
        factors: what makes its pairs.
        kind: the number by which the module asks for its pair.
        layer: position on the mode ``layer``.
    """

    factors: Factors
    kind: int
    layer: int


class Adding:
    """A forward hook that adds to a module's output and keeps nothing of it."""


class Share(Adding):
    """A forward hook: adds the shares of the sites of one module, while the adapter is active.

    An object and not a closure, so that it follows deepcopy and pickle. It holds no parameter: these
    belong to the adapter, and nothing of one forward outlives it.
    """

    def __init__(self, adapter: Adapter, sites: Sequence[Site]) -> None:
        self.adapter = adapter
        self.parts = parts_of(adapter, sites)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Torch's forward hook: the projection's output with the shares added."""
        adapter = self.adapter
        if not adapter.active:
            return None
        whole = isinstance(output, tuple)  # quantised layers return their scale beside the output
        y = output[0] if whole else output
        y = take_share(adapter, self.parts, args[0], y, owns_output(module))
        return (y, *output[1:]) if whole else y


def parts_of(adapter: Adapter, sites: Sequence[Site]) -> list[Part]:
    """What the sites of one module take from an adapter; several where they are in several groups."""
    return [
        Part(factors, factors.add(bundle), bundle.layer)
        for factors, bundle in adapter.bundles(sites)
    ]


def take_share(adapter: Adapter, parts: Iterable[Part], x: Tensor, y: Tensor, own: bool) -> Tensor:
    """The output of a module with the shares of an adapter added.

    Args:
        adapter: whose.
        parts: what the module takes.
        x: the module's input.
        y: its output.
        own: whether nobody else holds y, so that it can be added to in place.
    """
    if adapter.reads.around is None and not is_tracing():
        adapter.doubt()
    p = adapter.dropout if adapter.training else 0.0
    for factors, kind, layer in parts:
        first, second = factors.pair(kind, layer, y.dtype, y.device)
        h = adapter.reads.project(x, first, factors.readers(kind), p)
        y = add(y, h, second, own)
        own = True
    return y


def owns_output(module: nn.Module) -> bool:
    """Whether the output of a module is a fresh tensor that nobody but the hooks of shares has seen.

    Autograd does not need the output of a linear map, so it can then be added to in place.
    """
    return (
        type(module) in _FRESH
        and "forward" not in module.__dict__
        and not _global_forward_hooks
        and (
            len(module._forward_hooks) < 2  # the one that asks
            or all(isinstance(hook, Adding) for hook in module._forward_hooks.values())
        )
    )


class Owner(Protocol):
    """Whose shares are added: an adapter, or a bank."""

    reads: Reads

    def doubt(self) -> None:
        """The parameters may have changed in ways that leave no trace."""


@dataclass(frozen=True)
class Enter:
    """A forward pre-hook of the modules around sites. The outermost of them lets the parameters be
    compared: once in each forward, whichever part of the model is called."""

    owner: Owner

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Torch's forward pre-hook."""
        if not is_tracing() and self.owner.reads.enter(module):
            self.owner.doubt()


@dataclass(frozen=True)
class Leave:
    """A forward hook of the modules around sites: nothing of their forward is kept."""

    owner: Owner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Torch's forward hook."""
        if not is_tracing():
            self.owner.reads.leave(module)


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


def site_weight(model: nn.Module, site: Site) -> Any:
    """The weight of a site's module as it is stored, without a parametrization."""
    return original_weight(model.get_submodule(site.path), site.parameter)


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Let every site of the adapter take its share."""
    surround(model, adapter, adapter.groups)
    for path, sites in by_module(adapter.sites):
        module = model.get_submodule(path)
        if not sites[0].weight_read_directly:
            _free_number(module._forward_hooks)
            module.register_forward_hook(Share(adapter, sites))
            continue
        for site in sites:
            if not is_parametrized(module, site.parameter):
                _parametrize(module, site.parameter)
            _weight_share(module, site).shares.append((adapter, site))
    adapter.prepare()


def detach(model: nn.Module, adapter: Adapter) -> None:
    """Take back what `attach` did."""
    release(model, adapter, adapter.groups)
    for path, sites in by_module(adapter.sites):
        module = model.get_submodule(path)
        _drop(module._forward_hooks, adapter)
        for site in sites:
            if not site.weight_read_directly or not is_parametrized(module, site.parameter):
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
        for path in (site.path, *site.tied_paths):
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


def surround(model: nn.Module, owner: Owner, groups: Iterable[Group]) -> None:
    """Let the modules around the sites say when their forward begins and ends."""
    for module in _around(model, groups):
        _free_number(module._forward_pre_hooks)
        module.register_forward_pre_hook(Enter(owner))
        _free_number(module._forward_hooks)
        module.register_forward_hook(Leave(owner), always_call=True)


def release(model: nn.Module, owner: Owner, groups: Iterable[Group]) -> None:
    """Take back what `surround` did."""
    for module in _around(model, groups):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, h in hooks.items() if _is_of(h, owner)]:
                del hooks[number]
                module._forward_hooks_always_called.pop(number, None)


def _is_of(hook: object, owner: Owner) -> bool:
    return isinstance(hook, (Enter, Leave)) and hook.owner is owner


def _around(model: nn.Module, groups: Iterable[Group]) -> list[nn.Module]:
    """The modules that hold all sites of a group, the model first, and the parent of each site."""
    paths: dict[str, None] = {}
    for group in groups:
        parents = [path.rpartition(".")[0] for s in group.sites for path in (s.path, *s.tied_paths)]
        names = zip(*(parent.split(".") for parent in parents))
        shared = [each[0] for each in takewhile(lambda each: len(set(each)) == 1, names)]
        paths |= dict.fromkeys(".".join(shared[:depth]) for depth in range(len(shared) + 1))
        paths |= dict.fromkeys(parents)
    return list({id(module): module for module in map(model.get_submodule, paths)}.values())


def _free_number(hooks: Mapping[int, Any]) -> None:
    """Torch counts hooks from 0 in every process, so those of an unpickled module can have numbers
    that new ones are about to get: count on past them."""
    while RemovableHandle.next_id in hooks:
        RemovableHandle.next_id += 1


def _drop(hooks: dict[int, Any], adapter: Adapter) -> None:
    """Delete the shares of an adapter."""
    for key in [k for k, h in hooks.items() if isinstance(h, Share) and h.adapter is adapter]:
        del hooks[key]
