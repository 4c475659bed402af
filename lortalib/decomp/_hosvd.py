"""Makes starting values that follow the leading directions of a tensor, such as a gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ._arguments import check_values
from ._factors import mode_of
from ._legs import Legs
from ._modes import LORTA_MODES
from ._start import Randn, Start, invariant

#: Subspace iteration (Halko, Martinsson and Tropp 2011): extra columns beyond the rank, and rounds.
OVERSAMPLING, ROUNDS = 8, 8


def start_along(dense: Tensor, modes: str | Sequence[str] = LORTA_MODES) -> Start:
    """Make a start for ``init=`` whose directions are the leading ones of a tensor.

    As in the default start, the update is zero and the norm of every other parameter is the same. The
    default draws its directions at random; this start takes left singular vectors of the tensor
    (truncated higher-order SVD, De Lathauwer et al. 2000; for trains and other trees hierarchical SVD,
    Grasedyck 2010). If the tensor is the gradient of a loss, the first step of the zero parameter is
    close to the steepest step that the ranks allow. LoRA-GA (arXiv 2407.05000) does this for LoRA.

    Args:
        dense: the tensor; its sign and norm do not matter.
        modes: the names of its axes.

    Returns:
        A callable for the ``init`` of `network`. It raises ValueError for a network of another shape,
        for a tied parameter, for a hashed one that does not start at zero, and for bonds that form no tree:
        in CP of more than two parameters and in a ring, parameters have no orthogonal directions of their
        own.

    Raises:
        ValueError: names that do not fit the axes, a tensor that is zero or not finite.
        TypeError: no torch tensor.

    Example:
        >>> from lortalib.decomp import network
        >>> line, shape = "in p, layer p q (zero), out q", {"layer": 2, "in": 6, "out": 5}
        >>> target = network(line, shape, 2, init="normal").dense()
        >>> net = network(line, shape, 2, init=start_along(target, "layer in out"))
        >>> net.dense().abs().max().item()
        0.0
    """
    if not isinstance(dense, Tensor):
        raise TypeError(f"start_along takes a torch tensor; found {type(dense).__name__}")
    check_values([dense], "a start along it")
    names = tuple(modes.split()) if isinstance(modes, str) else tuple(modes)
    if len(names) != dense.ndim or len(set(names)) != len(names):
        raise ValueError(
            f"the tensor has {dense.ndim} axes, {tuple(dense.shape)}; found the names {names}"
        )
    norm = torch.linalg.vector_norm(dense.detach().double()).item()
    if not (norm and math.isfinite(norm)):
        raise ValueError("there are no directions in a tensor that is zero or not finite")
    wide = dense.detach().to(torch.promote_types(dense.dtype, torch.float32)) / norm

    def start(
        legs: Legs, sizes: Mapping[str, int], own: Sequence[str], randn: Randn
    ) -> list[Tensor]:
        found, asked = dict(zip(names, dense.shape)), dict[str, int]()
        for leg in own:
            mode = leg if leg in names else mode_of(leg)
            asked[mode] = asked.get(mode, 1) * sizes[leg]
        if found != asked:
            raise ValueError(f"the tensor has the shape {found}; the network is to have {asked}")
        if any(term.tied for term in legs.terms):
            raise ValueError(
                "a tied parameter cannot follow the directions of both of its sides; found it in\n"
                f"    {legs}"
            )
        edges = legs.tree(own, legs.zero)
        if any(legs.terms[edge.child].of for edge in edges):
            raise ValueError(
                "a hashed parameter cannot follow directions: few of its entries are free; found one in\n"
                f"    {legs}"
            )
        tensors = invariant(legs, sizes, own, randn)
        axes = list(legs.open_legs(names))
        x = wide.reshape([sizes[leg] for leg in axes])
        left = set(range(len(legs.terms)))
        for k, _, bond in edges:
            left.remove(k)
            # A leg that another remaining parameter carries stays; the other legs end at this parameter.
            stay = {leg for j in left for leg in legs.terms[j].legs} - {bond}
            rows = [leg for leg in legs.terms[k].legs if leg not in stay and leg != bond]
            batch = [leg for leg in legs.terms[k].legs if leg in stay]
            columns = [leg for leg in axes if leg not in legs.terms[k].legs]
            room = math.prod(sizes[leg] for leg in rows)
            if room < sizes[bond]:
                raise ValueError(
                    f"{sizes[bond]} directions were asked for bond {bond!r}, and {' '.join(rows)} has "
                    f"room for {room}; ask for a smaller rank, in\n    {legs}"
                )
            matrix = x.permute([axes.index(leg) for leg in batch + rows + columns])
            shape = [sizes[leg] for leg in batch]
            matrix = matrix.reshape(*shape, room, math.prod(sizes[leg] for leg in columns))
            u = leading_left_vectors(matrix, sizes[bond], randn)
            x = (u.mT @ matrix).reshape(*shape, sizes[bond], *(sizes[leg] for leg in columns))
            axes = [*batch, bond, *columns]
            found_legs = [*batch, *rows, bond]
            u = u.reshape([sizes[leg] for leg in found_legs])
            u = u.permute([found_legs.index(leg) for leg in legs.terms[k].legs])
            tensors[k] = u * (rms(tensors[k]) / rms(u)).to(u)
        return tensors

    return start


def leading_left_vectors(matrix: Tensor, rank: int, randn: Randn) -> Tensor:
    """Compute orthonormal columns that span the leading left singular vectors, by subspace iteration.

    Args:
        matrix: (..., rows, columns).
        rank: the number of vectors; at most the number of rows.
        randn: the source of the random first guess.

    Returns:
        The vectors as (..., rows, rank), ordered by singular value.
    """
    rows, columns = matrix.shape[-2:]
    width = min(rows, rank + OVERSAMPLING)
    # Up to this size a Gram matrix takes fewer multiplications than the rounds.
    small_enough, rounds = 2 * ROUNDS * width, 1
    if rank <= columns < rows and columns <= small_enough:
        vectors = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[..., -width:]
        q = torch.linalg.qr(matrix @ vectors).Q
    elif rows <= small_enough:
        q = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[..., -width:]
    else:
        rounds = ROUNDS
        q = torch.linalg.qr(matrix @ randn([columns, width]).to(matrix)).Q
    for _ in range(rounds):
        q = torch.linalg.qr(matrix @ (matrix.mT @ q)).Q
    small = q.mT @ matrix
    turn = torch.linalg.eigh(small @ small.mT).eigenvectors.flip(-1)[..., :rank]
    found: Tensor = q @ turn
    return found


def rms(tensor: Tensor) -> Tensor:
    """Compute the root mean square of the entries."""
    return tensor.square().mean().sqrt()
