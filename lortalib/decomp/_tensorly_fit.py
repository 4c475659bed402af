"""Runs TensorLy's own algorithms for CP, Tucker and trains."""

from __future__ import annotations

from collections.abc import Sequence

from tensorly.decomposition import parafac, tensor_train, tucker
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ._tensor_network import TensorNetwork
from ._tensorly import parameters_of, with_pytorch

#: The name of TensorLy's algorithm for a format.
TENSORLY = {"cp": "parafac", "tucker": "tucker", "tt": "tensor_train"}


def fit_with_tensorly(
    kind: str, dense: Tensor, net: TensorNetwork, tolerance: float, sweeps: int
) -> tuple[Tensor, ...] | None:
    """Run the algorithm of a format.

    Args:
        kind: a key of `TENSORLY`.
        dense: the target, of norm one, its axes in the order of ``net.modes``.
        net: a network of the format, which says the ranks.
        tolerance: stop when an iteration lowers the error by less.
        sweeps: the largest number of iterations.

    Returns:
        The parameters in the order of the line, or None if the algorithm meets a singular matrix or ends
        in NaN or infinity, as ``parafac`` does for more components than the tensor has.
    """
    names, ranks = list(net.modes), list(net.ranks.values())
    axes: Sequence[str] = names
    options = {"n_iter_max": sweeps, "tol": tolerance, "random_state": 0}
    try:
        if kind == "cp":
            obj = with_pytorch(lambda: parafac(dense, ranks[0], **options))
        elif kind == "tucker":
            bond_of = {term.legs[0]: term.legs[-1] for term in net.legs.terms[:-1]}
            per_axis = [net.ranks[bond_of[name]] for name in names]
            obj = with_pytorch(lambda: tucker(dense, per_axis, **options))
        else:
            axes = [term.legs[0] for term in net.legs.terms]
            train = dense.permute([names.index(name) for name in axes]).contiguous()
            obj = with_pytorch(lambda: tensor_train(train, [1, *ranks, 1]))
    except LinAlgError:
        return None
    found = parameters_of(obj, axes)[1]
    if not all(bool(tensor.isfinite().all()) for tensor in found):
        return None
    return tuple(found)
