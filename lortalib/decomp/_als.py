"""Fits the parameters of a network one after the other: alternating least squares for any line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ._einsum import Names, Path, compile_constant, contract_along, equation_of
from ._environment import GramPart, gram_parts
from ._legs import Legs
from ._objective import Objective
from ._pieces import Pieces

#: The relative error to a dense target below which right-hand sides are those of the residual, and errors are
#: summed, entry by entry. Above it differences of contractions have all the digits that matter.
NEAR = 5e-2

#: The share of a diagonal entry that Cholesky leaves of it, below which a Gram matrix counts as singular.
FLAT = 1e-8

#: The same share below which the squared distance that the normal equations tell has lost too many digits.
STEEP = 1e-4

#: Steps of L-BFGS in one sweep, for lines in which a parameter stands several times.
DESCENT_STEPS = 100

#: Called after every sweep with the number of sweeps and the relative error.
Progress = Callable[[int, float], object]


class Sweeper:
    """Improves the trainable parameters of a network in turn; no step raises the objective.

    The tensor is linear in a parameter that stands once, so its best values solve normal equations. Their
    matrix is kept as a Kronecker product of `gram_parts`. In directions that the equations leave open,
    the parameter stays as it is. In a parameter that stands n times the tensor is a polynomial; for such
    lines every sweep ends with steps of L-BFGS in all parameters together.

    Args:
        legs: the line.
        tensors: the parameters, in float64; they are replaced, not changed.
        objective: the target.
        ridge: the weight of the squared entries of all trainable parameters.

    Attributes:
        steps: how often a sweep changes all parameters: once, or with every step of L-BFGS.
    """

    def __init__(
        self, legs: Legs, tensors: Sequence[Tensor], objective: Objective, ridge: float
    ) -> None:
        self.legs, self.objective, self.ridge = legs, objective, ridge
        self.terms = tuple(term.legs for term in legs.terms)
        self.tensors = list(tensors)
        own = [k for k, term in enumerate(legs.terms) if not (term.tied or term.frozen)]
        # The root of a start along the target is zero, so it comes first.
        self.order = sorted(own, key=lambda k: bool(self.tensors[k].any()))
        self._once = [k for k in self.order if legs.owners.count(k) == 1]
        self.steps = 1 if len(self._once) == len(self.order) else DESCENT_STEPS
        self._is_far = True

    @property
    def pieces(self) -> Pieces:
        """The tensors with their legs."""
        return Pieces(self.terms, tuple(self.tensors))

    @torch.no_grad()
    def sweep(self) -> float:
        """Improve every trainable parameter once; return the relative error."""
        loss = None
        for position in self._once:
            loss = self._solve(position)
        if self.steps > 1:
            self._descend()
            loss = None
        error = math.inf if loss is None else self.objective.relative(loss.item())
        if loss is None or (self.objective.is_dense and error <= NEAR):
            error = self.objective.relative_error(self.pieces)
        self._is_far = error > NEAR or not self.objective.is_dense
        return error

    def penalised(self, error: float) -> float:
        """Compute the objective, with the ridge, from the relative error of a target of norm one."""
        if not self.ridge:
            return error**2
        squares = sum(self.tensors[k].square().sum().item() for k in self.order)
        return error**2 + self.ridge * squares

    def conditions(self) -> dict[int, float]:
        """Compute the condition number of the Gram matrix of each parameter that stands once."""
        return {k: condition(self._parts(k)) for k in self._once}

    @staticmethod
    def growth(legs: Legs, tensors: Sequence[Tensor]) -> float:
        """Compute the norm that the tensor would have if all terms of its sum were orthogonal."""
        squares = tuple(tensor.square() for tensor in tensors)
        return math.sqrt(
            Pieces(tuple(term.legs for term in legs.terms), squares).contract(()).item()
        )

    def _parts(self, position: int) -> list[GramPart]:
        return gram_parts(self.pieces, position, self.objective.modes, self.objective.weight)

    def _solve(self, position: int) -> Tensor | None:
        """Give a parameter its best values.

        Returns:
            The squared distance to the target, where the normal equations tell it well: far from the target,
            and if they leave no direction open, nor almost.
        """
        parts, now, legs = self._parts(position), self.tensors[position], self.terms[position]
        triangles, least = triangles_of(parts, self.ridge)
        if not self._is_far:
            right = self.objective.residual_side(self.pieces, position)
            self.tensors[position] = now + step(parts, triangles, right, now, legs, self.ridge)
            return None
        target = self.objective.target_side(self.pieces, position)
        if triangles is None:
            right = target - gram_times(parts, now, legs)
            self.tensors[position] = now + step(parts, triangles, right, now, legs, self.ridge)
            return None
        now = self.tensors[position] = divided(target, parts, triangles, legs)
        if position != self._once[-1] or (self.objective.is_dense and least <= STEEP):
            return None
        # With G = L L^T, |T - N|^2 is |T|^2 less |L^-1 b|^2: a sum of squares, in which no terms cancel.
        half = divided(target, parts, triangles, legs, half=True)
        return self.objective.squared_norm - half.square().sum() - self.ridge * now.square().sum()

    def _descend(self) -> None:
        """Lower the objective in all trainable parameters together.

        L-BFGS drops what it has learnt about curvature below fixed thresholds. So the objective is divided
        by its value, and steps by the root of that, which makes both about one however near the end is.
        """
        begin = {k: self.tensors[k] for k in self.order}

        def loss(own: Mapping[int, Tensor]) -> Tensor:
            squares = torch.stack([tensor.square().sum() for tensor in own.values()]).sum()
            tensors = [own.get(owner, self.tensors[k]) for k, owner in enumerate(self.legs.owners)]
            return self.objective.loss(Pieces(self.terms, tuple(tensors))) + self.ridge * squares

        value, least = (
            loss(begin),
            (10 * self.objective.precision) ** 2,
        )  # below are rounding errors
        if not value > least or not value.isfinite():
            return
        steps = {k: torch.zeros_like(tensor, requires_grad=True) for k, tensor in begin.items()}

        def moved() -> dict[int, Tensor]:
            return {k: tensor + value.sqrt() * steps[k] for k, tensor in begin.items()}

        optimizer = torch.optim.LBFGS(
            list(steps.values()),
            max_iter=DESCENT_STEPS,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            now = loss(moved()).clamp(min=least) / value
            now.backward()
            return now

        with torch.enable_grad():
            optimizer.step(closure)
        own = {k: tensor.detach() for k, tensor in moved().items()}
        if loss(own) <= value:
            self.tensors = [
                own.get(owner, self.tensors[k]) for k, owner in enumerate(self.legs.owners)
            ]


def step(
    parts: Sequence[GramPart],
    triangles: Sequence[Tensor] | None,
    residual: Tensor,
    now: Tensor,
    legs: Names,
    ridge: float,
) -> Tensor:
    """Solve the normal equations of a parameter for its change; see `triangles_of`.

    Args:
        parts: the factors of the Gram matrix.
        triangles: their Cholesky factors; None if it leaves directions open, in which the step is zero.
        residual: the right-hand side for the residual, in the shape of the parameter.
        now: the present values.
        legs: the legs of the parameter.
        ridge: added to every eigenvalue.
    """
    right = residual - ridge * now
    if triangles is None:
        return _step_by_eigenvectors(parts, right, legs, ridge)
    return divided(right, parts, triangles, legs)


def triangles_of(
    parts: Sequence[GramPart], ridge: float
) -> tuple[list[Tensor], float] | tuple[None, float]:
    """Compute the Cholesky factor of each part of a Gram matrix.

    Returns:
        The factors, and the least share of a diagonal entry that Cholesky leaves of it. No factors if a row
        of a part all but depends on those above it; or if there is a ridge and not one part, since a
        Kronecker product with a ridge is none.
    """
    if ridge and len(parts) != 1:
        return None, 0.0
    found, least = [], 1.0
    for part in parts:
        matrices = part.matrices
        if ridge:
            matrices = matrices + ridge * torch.eye(matrices.shape[-1]).to(matrices)
        triangle, info = torch.linalg.cholesky_ex(matrices)
        if info.any():
            return None, 0.0
        pivots, whole = (each.diagonal(dim1=-2, dim2=-1) for each in (triangle, matrices))
        share = (pivots.square() / whole).min().item()
        if not share > FLAT:  # also for NaN
            return None, 0.0
        found.append(triangle)
        least = min(least, share)
    return found, least


def divided(
    tensor: Tensor,
    parts: Sequence[GramPart],
    triangles: Sequence[Tensor],
    legs: Names,
    half: bool = False,
) -> Tensor:
    """Divide a parameter by its Gram matrix, whose parts are given by their Cholesky factors.

    Args:
        tensor: the parameter, or a right-hand side in its shape.
        parts: the factors of the Gram matrix.
        triangles: their Cholesky factors, as `triangles_of` returns them.
        legs: the legs of the parameter.
        half: whether the tensor is divided by the Cholesky factors alone.
    """
    for part, triangle in zip(parts, triangles):
        order, back = _orders(legs, (*part.modes, *part.bonds))
        turned = tensor.permute(order)
        lead = turned.shape[: len(part.modes)]
        columns = turned.reshape(*lead, triangle.shape[-1], -1)
        found = (
            torch.linalg.solve_triangular(triangle, columns, upper=False)
            if half
            else torch.cholesky_solve(columns, triangle)
        )
        tensor = found.reshape(turned.shape).permute(back)
    return tensor


@compile_constant
def _orders(legs: Names, first: Names) -> tuple[list[int], list[int]]:
    """Return the permutation that puts some legs first, and the one that takes it back."""
    order = [legs.index(leg) for leg in (*first, *(leg for leg in legs if leg not in first))]
    return order, sorted(range(len(order)), key=order.__getitem__)


def _step_by_eigenvectors(
    parts: Sequence[GramPart], right: Tensor, legs: Names, ridge: float
) -> Tensor:
    """Solve normal equations that leave directions open, in which the step is zero; see `solve`."""
    values, turns = right.new_ones([1] * right.ndim), []
    for part in parts:
        number, vectors = torch.linalg.eigh(part.matrices)
        lead = [legs.index(mode) for mode in part.modes]
        axes = [legs.index(bond) for bond in part.bonds]
        # The eigenvalues of several bonds are laid out over these bonds, whichever is which.
        shape = [right.shape[axis] for axis in lead + axes]
        values = values * _aligned(number.clamp(min=0).reshape(shape), lead + axes, right.ndim)
        if axes:
            turns.append((part, vectors.reshape(*shape, *[right.shape[axis] for axis in axes])))
    bonds = [k for k, leg in enumerate(legs) if any(leg in part.bonds for part in parts)]
    values = values.expand(right.shape)
    largest = values.amax(bonds, keepdim=True) if bonds else values
    room = math.prod(right.shape[k] for k in bonds)
    total = values + ridge
    is_open = total <= largest * room * torch.finfo(right.dtype).eps * 4
    turned = _turned(right, turns, legs)
    step = torch.where(is_open, 0.0, turned / torch.where(is_open, 1.0, total))
    return _turned(step, turns, legs, back=True)


def gram_times(parts: Sequence[GramPart], now: Tensor, legs: Names) -> Tensor:
    """Multiply a parameter by its Gram matrix, the Kronecker product of the parts."""
    turns = []
    for part in parts:
        sizes = [now.shape[legs.index(leg)] for leg in (*part.modes, *part.bonds, *part.bonds)]
        turns.append((part, part.matrices.reshape(sizes)))
    return _turned(now, turns, legs, back=True)


def condition(parts: Sequence[GramPart]) -> float:
    """Compute the condition number of a Gram matrix scaled to a unit diagonal; the largest over its
    slices, infinity if it is singular."""
    modes = tuple(dict.fromkeys(mode for part in parts for mode in part.modes))
    total = torch.ones([1] * len(modes))
    for part in parts:
        info = torch.finfo(part.matrices.dtype)
        roots = part.matrices.diagonal(dim1=-2, dim2=-1).clamp(min=info.tiny).sqrt()
        scaled = part.matrices / roots.unsqueeze(-1) / roots.unsqueeze(-2)
        low, high = torch.linalg.eigvalsh(scaled).aminmax(dim=-1)
        eps = info.eps * scaled.shape[-1]
        ratio = torch.where(low > eps * high, high / low, torch.inf)
        total = total * _aligned(ratio, [modes.index(mode) for mode in part.modes], len(modes))
    return float(total.max())


def _aligned(tensor: Tensor, axes: Sequence[int], ndim: int) -> Tensor:
    """Put the axes of a tensor at ``axes`` of ``ndim`` axes; the others have size 1."""
    order = sorted(range(len(axes)), key=lambda k: axes[k])
    shape = [1] * ndim
    for k, axis in enumerate(axes):
        shape[axis] = tensor.shape[k]
    return tensor.permute(order).reshape(shape)


def _turned(
    tensor: Tensor, turns: Sequence[tuple[GramPart, Tensor]], legs: Names, back: bool = False
) -> Tensor:
    """Write a parameter in the eigenvectors of its Gram matrix, or back.

    The vectors of a part have the axes (*modes, *bonds, *eigenvalues).
    """
    for part, vectors in turns:
        tensor = contract_along(_turning(legs, part.modes, part.bonds, back), (tensor, vectors))
    return tensor


@compile_constant
def _turning(legs: Names, modes: Names, bonds: Names, back: bool) -> Path:
    """Write the contraction of a parameter with the eigenvectors of a part of its Gram matrix."""
    fresh = dict(zip(bonds, (bond + "^" for bond in bonds)))
    turned = tuple(fresh.get(leg, leg) for leg in legs)
    own, output = (turned, legs) if back else (legs, turned)
    return ((0, 1, equation_of((own, (*modes, *bonds, *fresh.values())), output)),)
