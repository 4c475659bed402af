"""The records of anatomy: a site, and where its features lie in a fused projection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Every role, in the order of the mode ``matrix``.
ROLES = ("q", "k", "v", "o", "q_a", "kv_a", "gate", "up", "down", "router")


#: The roles of an MLP.
MLP_ROLES = ("gate", "up", "down", "router")


#: Roles whose output is the residual stream.
WRITERS = frozenset(("o", "down"))


@dataclass(frozen=True)
class FeatureRows:
    """The features of one site on the output axis of a fused projection.

    Attributes:
        offset: index of the first feature.
        dims: (size, stride) pairs, outermost first; their sizes multiply to the site's features.

    Example:
        >>> FeatureRows(2, ((2, 6), (2, 1))).index().tolist()
        [2, 3, 8, 9]
    """

    offset: int
    dims: tuple[tuple[int, int], ...]

    def index(self, device: torch.device | None = None) -> Tensor:
        """Indices on the fused axis, in the order (head, component)."""
        index = torch.tensor(self.offset, device=device)
        for size, stride in self.dims:
            index = index.unsqueeze(-1) + torch.arange(0, size * stride, stride, device=device)
        return index.reshape(-1)

    def __str__(self) -> str:
        return f"{self.offset}+" + "".join(f"[{size}:{stride}]" for size, stride in self.dims)


@dataclass(frozen=True)
class Site:
    """One projection, or one part of a fused projection, in one layer.

    Attributes:
        stack: which tower of layers: ``"encoder"``, ``"decoder.EncDecAttention"`` ... Together with
            layer and role it identifies the site, also where module paths are renamed.
        layer: index of the layer in its stack.
        role: ``"q"``, ``"k"``, ``"v"``, ``"o"`` of attention (``"q_a"`` and ``"kv_a"`` are the
            projections of latent attention that read the residual stream); ``"gate"``, ``"up"``,
            ``"down"`` of an MLP, ``"router"`` of a mixture of experts.
        path: path of the projection module in the model.
        heads: heads of this projection: of keys and values for k and v.
        query_heads: heads of the block's queries; a multiple of ``heads``.
        head_dim: components of one head.
        width: size of the other side: the residual stream, or the latent that is read.
        writer: whether the residual stream is the output (o) and not the input (q, k, v).
        transposed: whether the weight is stored (in, out), as in transformers' Conv1D.
        parameter: name of the weight in its module.
        rows: where the features lie, if the module holds other features too.
        fused: output features of the whole module, if ``rows`` is set.
        weight_read_directly: whether the module's forward is not called: its weight is read directly.
        tied_paths: paths of further modules that hold the very same weight; they get the same update.
        experts: number of experts packed in the weight's first axis; 0 for an ordinary weight.
    """

    stack: str
    layer: int
    role: str
    path: str
    heads: int
    query_heads: int
    head_dim: int
    width: int
    writer: bool
    transposed: bool = False
    parameter: str = "weight"
    rows: FeatureRows | None = None
    fused: int | None = None
    weight_read_directly: bool = False
    tied_paths: tuple[str, ...] = ()
    experts: int = 0

    @property
    def key(self) -> tuple[str, int, str]:
        """What identifies the site in a file: (stack, layer, role)."""
        return self.stack, self.layer, self.role

    @property
    def features(self) -> int:
        """heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the module's whole weight, as stored."""
        shape = self.fused or self.features, self.width
        matrix = shape if self.writer == self.transposed else shape[::-1]
        return (self.experts, *matrix) if self.experts else matrix


def feature_rows(offset: int, *dims: tuple[int, int]) -> FeatureRows:
    """Rows without outer dimensions of one entry and with neighbours joined where they touch."""
    kept: list[tuple[int, int]] = []
    for size, stride in dims:
        if size == 1:
            continue
        if kept and kept[-1][1] == size * stride:
            kept[-1] = kept[-1][0] * size, stride
        else:
            kept.append((size, stride))
    rows = FeatureRows(offset, tuple(kept) or ((1, 1),))
    assert math.prod(size for size, _ in rows.dims) == math.prod(size for size, _ in dims)
    return rows
