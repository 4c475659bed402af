"""Computes the cuts of all sites of a group that have one head count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...decomp import Cut, CutPlan
from .._anatomy import Site


class CutByMatrix(NamedTuple):
    """The cuts of all sites of a group with one head count.

    Attributes:
        roles: role for each position of the axis ``matrix``.
        cut: A (..., matrix, p, width) and B (..., matrix, heads*head_dim, p).
        in_parameters: the parameters that A depends on, if every matrix has the same A.
    """

    roles: tuple[str, ...]
    cut: Cut
    in_parameters: tuple[int, ...] | None

    def of(self, site: Site) -> Cut:
        """Return the cut of one site."""
        matrix = self.roles.index(site.role)
        at = (0 if side.shape[-3] == 1 else matrix for side in self.cut)
        return Cut(*(side.select(-3, position) for side, position in zip(self.cut, at)))


@dataclass(frozen=True)
class CutRecipe:
    """The steps that compute the cuts of the sites with one head count from the parameters.

    Attributes:
        roles: the roles of the sites.
        takes: (parameter, axis, positions) for each parameter that is restricted to some positions.
        constants: tensors of the network that are no parameters; they follow the parameters.
        plan: the plan that divides the network.
        in_parameters: as in `CutByMatrix`.
    """

    roles: tuple[str, ...]
    takes: list[tuple[int, int, Tensor]]
    constants: list[Tensor]
    plan: CutPlan
    in_parameters: tuple[int, ...] | None

    def cut(self, tensors: Sequence[Tensor]) -> CutByMatrix:
        """Compute the cuts from these parameters."""
        own = [*tensors, *self.constants]
        for parameter, axis, at in self.takes:
            own[parameter] = own[parameter].index_select(axis, at)
        return CutByMatrix(self.roles, self.plan.cut(own), self.in_parameters)
