"""Fits a network to a dense tensor by TensorLy's own algorithms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac, tensor_train
from tensorly.decomposition import tucker as tensorly_tucker
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ._build import Rank
from ._formats import get_format
from ._modes import Shape
from ._network import Network
from ._tensorly import Modes, TensorLyObject, axis_names, network_of, real, with_pytorch

#: The class of TensorLy object that each algorithm returns.
_KINDS = {"cp": CPTensor, "tucker": TuckerTensor, "tt": TTTensor}

#: Options that make an algorithm return more than the decomposition, each with what to use instead.
_MORE = {
    "return_errors": "the error of the fit is in Fit.error",
    "sparsity": "a network has no sparse part; call tensorly.decomposition.parafac for one",
}


class Fit(NamedTuple):
    """A network fitted to a dense tensor.

    Attributes:
        network: the fitted network, whose parameters are finite.
        error: ``|dense - network.dense()| / |dense|`` in the Frobenius norm; with a mask, both
            norms are over the observed entries.
    """

    network: Network
    error: float


def decompose(
    dense: Tensor,
    decomposition: str,
    rank: Rank,
    *,
    modes: Modes | None = None,
    **options: Any,
) -> Fit:
    """Fit a network to a dense tensor with TensorLy's own algorithm for the format.

    Args:
        dense: the tensor, of any shape with an axis for each mode. Half precision is computed in
            float32; the factors have the dtype of the tensor.
        decomposition: ``"cp"`` (``parafac``, alternating least squares), ``"tucker"`` (``tucker``,
            orthogonal iteration) or ``"tt"`` (``tensor_train``, successive truncated SVDs).
        rank: as for the format; a rank larger than the modes can fill is reduced, with a warning.
        modes: names of the axes, as in `from_tensorly`.
        options: passed to TensorLy (``n_iter_max``, ``tol``, ``init``, ``random_state`` ...). CP and
            Tucker take a ``mask`` of the tensor's shape: only entries where it is 1 are fitted, and the
            tensor may hold NaN where it is 0.

    Returns:
        `Fit`: the network and its relative error, measured on the network returned.

    Raises:
        ValueError: a format that TensorLy has no algorithm for, names that do not fit the axes, a
            tensor with NaN or infinity at an observed entry, a mask that does not fit the tensor, or
            an algorithm that ends in NaN or infinity (CP can, with more components than the tensor
            has).
        TypeError: a complex tensor, an option that TensorLy does not know for the format, or one that
            makes it return more than the decomposition (``return_errors``, ``sparsity``).

    Example:
        >>> fit = decompose(torch.ones(2, 3, 4), "tt", 1, modes="layer in out")
        >>> fit.network.count(), round(fit.error, 4)
        (9, 0.0)
    """
    dense = real(dense, "a tensor").detach()
    names = axis_names(modes, tuple(dense.shape))
    if len(names) < 2:
        raise ValueError(f"a tensor of one mode ({', '.join(names)}) has no decomposition")
    kind = get_format(decomposition).name
    if kind not in _KINDS:
        raise ValueError(
            f"TensorLy has no algorithm for {decomposition!r} here; choose 'cp', 'tucker' or 'tt'"
        )
    options = _checked_options(kind, dense, options)
    observed = (
        options["mask"] != 0 if "mask" in options else torch.ones_like(dense, dtype=torch.bool)
    )
    dense = torch.where(observed, dense, torch.zeros_like(dense))
    if not torch.isfinite(dense).all():
        where = " where the mask says that it is known" if "mask" in options else ""
        raise ValueError(f"the tensor to decompose holds NaN or infinity{where}")
    shape = Shape(dict(zip(names, dense.shape)))
    # The format checks and reduces the ranks and sets the order of the modes.
    net = get_format(kind)(shape, rank, init="invariant", device=dense.device, dtype=dense.dtype)
    peak = dense.abs().max().double().item()
    if peak == 0:  # TensorLy would meet a singular matrix; the zero network is exact
        return Fit(net, 0.0)
    # The algorithm gets a tensor of norm one, so that tiny or huge entries cannot make it fail. Squares of
    # such entries overflow or vanish, so the norm is taken after division by the largest entry.
    norm = torch.linalg.vector_norm(dense.double() / peak).item()
    wide = (dense.double() / peak / norm).to(torch.promote_types(dense.dtype, torch.float32))
    if "mask" in options:
        options["mask"] = options["mask"].to(wide)
    try:
        obj, axes = _fitted(kind, wide, net, names, options)
        fitted = network_of(obj, axes, names)
    except LinAlgError as singular:
        raise ValueError(f"TensorLy met a singular system at {_reason(kind, net)}") from singular
    if not _is_finite(fitted):
        raise ValueError(f"TensorLy ended in NaN or infinity at {_reason(kind, net)}")
    with torch.no_grad():
        fitted.tensors[0].mul_(norm * peak)
    fitted = fitted.to(dense.dtype)
    difference = (dense.double() - fitted.dense().detach().double())[observed]
    error = torch.linalg.vector_norm(difference / peak).item() / norm
    if not (_is_finite(fitted) and math.isfinite(error)):
        raise ValueError(
            f"the fitted parameters are too large for {dense.dtype}; give the tensor in a wider dtype, "
            "or divided by its norm"
        )
    return Fit(fitted, error)


def _fitted(
    kind: str, wide: Tensor, net: Network, names: Sequence[str], options: Mapping[str, Any]
) -> tuple[TensorLyObject, tuple[str, ...]]:
    """Run the algorithm of a format; return its object and the names of the object's axes."""
    axes, ranks = tuple(names), list(net.ranks.values())
    if kind == "cp":
        options = {"n_iter_max": 1000, "tol": 1e-10, "random_state": 0, **options}
        obj = with_pytorch(lambda: parafac(wide, ranks[0], **options))
    elif kind == "tucker":
        bond_of = {term.legs[0]: term.legs[-1] for term in net.legs.terms[:-1]}
        per_axis = [net.ranks[bond_of[name]] for name in names]
        options = {"n_iter_max": 200, "tol": 1e-10, "random_state": 0, **options}
        obj = with_pytorch(lambda: tensorly_tucker(wide, per_axis, **options))
    else:
        axes = tuple(term.legs[0] for term in net.legs.terms)
        train = wide.permute([names.index(name) for name in axes]).contiguous()
        obj = with_pytorch(lambda: tensor_train(train, [1, *ranks, 1], **options))
    if not isinstance(obj, _KINDS[kind]):
        raise TypeError(
            f"with the options {', '.join(options)}, TensorLy returned a {type(obj).__name__} in place "
            f"of a {_KINDS[kind].__name__}; leave out the option that asks for more"
        )
    return obj, axes


def _checked_options(kind: str, dense: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options for TensorLy; the mask becomes zeros and ones on the tensor's device."""
    options = dict(options)
    for name, instead in _MORE.items():
        value = options.get(name)
        if value is not None and value is not False:
            raise TypeError(
                f"{name}={value!r} makes TensorLy return more than the decomposition; leave it out: "
                f"{instead}"
            )
    if options.get("mask") is None:
        options.pop("mask", None)
        return options
    if kind == "tt":
        raise TypeError(
            "TensorLy's algorithm for 'tt' takes no mask; fit 'cp' or 'tucker', or fill in the "
            "missing entries first"
        )
    mask = real(options["mask"], "a mask").to(dense.device)
    if mask.shape != dense.shape:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}, the tensor {tuple(dense.shape)}; they are to be "
            "the same"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            "a mask holds ones where an entry is known and zeros where it is missing; found other values"
        )
    if not mask.any():
        raise ValueError("the mask says that every entry is missing; there is nothing to fit")
    options["mask"] = mask
    return options


def _is_finite(net: Network) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in net.tensors)


def _reason(kind: str, net: Network) -> str:
    """Name the ranks that failed and what to try, for an error message."""
    if kind == "cp":
        return (
            f"rank {net.ranks['r']}: the tensor may have a smaller rank; ask for fewer components, or "
            "for 'tucker' or 'tt', or try another random_state with init='random'"
        )
    return f"ranks {net.ranks}: ask for smaller ranks, or try another random_state or init"
