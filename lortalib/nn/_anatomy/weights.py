"""Reads how a module stores a weight: its widths, its original if parametrized, the rows of each site."""

from __future__ import annotations

import inspect
import re
import sys
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .site import Site


def is_conv1d(module: nn.Module) -> bool:
    """Return True for transformers' Conv1D, which stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D"


def is_projection(module: nn.Module) -> bool:
    """Return True for a linear map of known widths: nn.Linear, a quantised one, or transformers' Conv1D."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(width, int) for width in widths) and hasattr(module, "weight")


def widths(module: nn.Module) -> tuple[int, int]:
    """Return the (in, out) features of a projection module."""
    if is_conv1d(module):
        n_in, n_out = module.get_parameter("weight").shape
        return int(n_in), int(n_out)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def original_weight(module: nn.Module, name: str) -> Any:
    """Return a weight as it is stored, without the update that an adapter adds when it is read.

    If the weight is parametrized and has one original, that is returned."""
    if is_parametrized(module, name):
        parametrization = module.parametrizations[name]  # type: ignore[index, union-attr]
        if hasattr(parametrization, "original"):
            return parametrization.original
    if name in module._parameters:
        return module._parameters[name]
    return getattr(module, name)


def check_stored(module: nn.Module, name: str, path: str) -> None:
    """Refuse a weight that its module computes from other parameters whenever it is used.

    torch's parametrize, weight_norm and prune do so. An update of what is stored is not one of the weight.

    Args:
        module: the module.
        name: name of the weight in the module.
        path: path of the module, for the message.

    Raises:
        ValueError: the weight is computed.
    """
    # A tensor that is no parameter of the module: a hook of weight_norm or prune writes it in each forward.
    if is_parametrized(module, name) or isinstance(vars(module).get(name), Tensor):
        raise ValueError(
            f"the {name} of {path} is computed from other parameters in each forward (by "
            "torch.nn.utils.parametrize, weight_norm or prune), so an update can neither be added to what is "
            "stored nor taken out. Make it an ordinary parameter first (parametrize.remove_parametrizations, "
            "prune.remove), or leave the adapter unmerged"
        )


def original_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's own parameters by name; for a parametrized one, its original."""
    own = dict(module.named_parameters(recurse=False))
    if is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            weight = original_weight(module, name)
            if isinstance(weight, nn.Parameter):
                own[name] = weight
    return own


def site_weight(model: nn.Module, site: Site) -> Any:
    """Return the weight of a site's module, as it is stored."""
    return original_weight(model.get_submodule(site.path), site.parameter)


def as_stored(dense: Tensor, site: Site) -> Tensor:
    """Bring the update of one site to the shape of its module's whole stored weight; rows of other
    sites are zero.

    Args:
        dense: the update as (head*out, in), or (expert, head*out, in) for packed experts.
        site: the site.
    """
    if site.rows is not None:
        whole = dense.new_zeros(*dense.shape[:-2], site.fused or 0, site.width)
        dense = whole.index_copy(-2, site.rows.index(dense.device), dense)
    return dense if site.writer == site.transposed else dense.mT


def through_weight(weight: Tensor, stream: Tensor, site: Site) -> Tensor:
    """Compute how a stored weight changes if its module reads or writes a stream multiplied by a matrix.

    Args:
        weight: the weight of the base, as stored.
        stream: M (width, width), with ``x + M x`` in place of x; with a leading axis for packed experts.
        site: the site of the weight.
    """
    if site.writer == site.transposed:  # the stream is the last axis of the stored weight
        return weight @ (stream.mT if site.writer else stream)
    return (stream if site.writer else stream.mT) @ weight


@lru_cache(maxsize=1024)
def children_read_directly(cls: Any) -> frozenset[str]:
    """Find children whose weight the class's own code reads as a tensor, so that no forward hook would run.

    ``self.q_proj.weight.dtype`` does not count, because nothing is computed with it, nor does the method
    ``fuse_projections`` of diffusers, which no forward calls.
    """
    names: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module or not hasattr(sys.modules.get(base.__module__), "__file__"):
            break
        try:
            source = inspect.getsource(base)
            if "fuse_projections" in vars(base):
                source = source.replace(inspect.getsource(base.fuse_projections), "")
        except (OSError, TypeError):
            continue
        names |= set(
            re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|data_ptr))", source)
        )
    return frozenset(names)
