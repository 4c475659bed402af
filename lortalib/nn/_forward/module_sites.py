"""Defines the sites of one module, and the low-rank pair that they give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._anatomy import Site
from .._group import Group
from .cuts import CutByMatrix


class Pair(NamedTuple):
    """A low-rank pair in the order of use, ``y += (x @ first^T) @ second``; leading axes are slices.

    Attributes:
        first: (p, features that the module reads).
        second: (p, features of the module's whole output). One of the two contains the scaling.
    """

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class ModuleSites:
    """The sites of one group in one module, whose updates are added together.

    Attributes:
        group: the group.
        sites: the sites; a fused projection has several.
    """

    group: Group
    sites: tuple[Site, ...]

    @cached_property
    def layer(self) -> int:
        """The position on the mode ``layer``."""
        return self.group.layers.index(self.sites[0].layer)

    @cached_property
    def signature(self) -> tuple[Any, ...]:
        """A key that is equal for modules of different layers whose pairs come from the same contraction."""
        return tuple((s.role, s.heads, s.writer, s.rows, s.fused) for s in self.sites)

    @property
    def writer(self) -> bool:
        """True if the second map is A, because the module writes to the residual stream. On the stream A is
        always first."""
        return self.sites[0].writer and not self.group.on_stream

    def in_parameters(self, cuts: Mapping[int, CutByMatrix]) -> tuple[int, ...] | None:
        """Return the parameters that A depends on if all these sites share one A, else None."""
        found = {cuts[site.heads].in_parameters for site in self.sites}
        return found.pop() if len(found) == 1 else None

    def pair(self, cuts: Mapping[int, CutByMatrix], scaling: float) -> Pair:
        """Make the pair of these sites from the cuts of their group, with the leading axes of the cuts."""
        parts = [cuts[site.heads].of(site) for site in self.sites]
        a, bs = parts[0].A, [part.B.mT for part in parts]
        if len(bs) > 1 and self.in_parameters(cuts) is None:
            # Each site has an A of its own, so its rows of B stand below those of the sites before.
            ranks = [part.A.shape[-2] for part in parts]
            a = torch.cat([part.A for part in parts], -2)
            bs = [pad(b, (0, 0, sum(ranks[:k]), sum(ranks[k + 1 :]))) for k, b in enumerate(bs)]
        b = bs[0]
        if self.sites[0].rows is not None:
            columns = torch.cat([site.rows.index(b.device) for site in self.sites if site.rows])
            own = torch.cat(bs, -1)
            b = own.new_zeros(*own.shape[:-1], self.sites[0].fused or 0)
            b = b.index_copy(-1, columns, own)
        a = a * scaling  # A is the smaller side if all matrices share it
        return Pair(b, a) if self.writer else Pair(a, b)
