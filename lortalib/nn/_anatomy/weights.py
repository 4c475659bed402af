"""How a module stores a weight: its widths, its original where it is parametrized, and where the update of
a site lies in it."""

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
    """Whether it is transformers' Conv1D, which stores its weight (in, out)."""
    return type(module).__name__ == "Conv1D"


def is_projection(module: nn.Module) -> bool:
    """A linear map of known widths: nn.Linear, a quantised stand-in, or transformers' Conv1D."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(width, int) for width in widths) and hasattr(module, "weight")


def widths(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a projection module."""
    if is_conv1d(module):
        n_in, n_out = module.get_parameter("weight").shape
        return int(n_in), int(n_out)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def original_weight(module: nn.Module, name: str) -> Any:
    """A weight as it is stored: the original, where it is parametrized and has one original; without what
    an adapter adds when it is read."""
    if is_parametrized(module, name):
        parametrization = module.parametrizations[name]  # type: ignore[index, union-attr]
        if hasattr(parametrization, "original"):
            return parametrization.original
    if name in module._parameters:
        return module._parameters[name]
    return getattr(module, name)


def original_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters by name, the original of each that is parametrized."""
    own = dict(module.named_parameters(recurse=False))
    if is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            weight = original_weight(module, name)
            if isinstance(weight, nn.Parameter):
                own[name] = weight
    return own


def site_weight(model: nn.Module, site: Site) -> Any:
    """The weight of a site's module as it is stored."""
    return original_weight(model.get_submodule(site.path), site.parameter)


def as_stored(dense: Tensor, site: Site) -> Tensor:
    """The update of one site in the shape in which its module's whole weight is stored; rows of other
    sites are zero.

    Args:
        dense: (head*out, in), or (expert, head*out, in) for packed experts.
        site: where it belongs.
    """
    if site.rows is not None:
        whole = dense.new_zeros(*dense.shape[:-2], site.fused or 0, site.width)
        dense = whole.index_copy(-2, site.rows.index(dense.device), dense)
    return dense if site.writer == site.transposed else dense.mT


def through_weight(weight: Tensor, stream: Tensor, site: Site) -> Tensor:
    """The change of a weight, as stored, whose module reads or writes the stream changed by a matrix.

    Args:
        weight: the base's, as stored.
        stream: M (width, width), with ``x + M x`` in place of x; with a leading axis for packed experts.
        site: where.
    """
    if site.writer == site.transposed:  # the stream is the last axis of the stored weight
        return weight @ (stream.mT if site.writer else stream)
    return (stream if site.writer else stream.mT) @ weight


@lru_cache(maxsize=1024)
def children_read_directly(cls: Any) -> frozenset[str]:
    """Children whose weight the class's own code reads as a tensor, so that hooks would be passed by.

    ``self.q_proj.weight.dtype`` does not count: nothing is computed with it.
    """
    names: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module or not hasattr(sys.modules.get(base.__module__), "__file__"):
            break
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            continue
        names |= set(
            re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|data_ptr))", source)
        )
    return frozenset(names)
