"""How a module stores a weight: its widths, its original where it is parametrized, and where the update of
a site lies in it."""

from __future__ import annotations

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
    """A weight as it is stored: the original, where it is parametrized."""
    if is_parametrized(module, name):
        return module.parametrizations[name].original  # type: ignore[index, union-attr]
    return getattr(module, name)


def original_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters by name, the original of each that is parametrized."""
    own = dict(module.named_parameters(recurse=False))
    if is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            own[name] = original_weight(module, name)
    return own


def site_weight(model: nn.Module, site: Site) -> Any:
    """The weight of a site's module as it is stored, without a parametrization."""
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
