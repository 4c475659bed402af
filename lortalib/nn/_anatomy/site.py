"""Defines the record of one site, and of where its features lie in a fused projection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: All roles, in the order of the mode ``matrix``.
ROLES = ("q", "k", "v", "o", "q_a", "kv_a", "gate", "up", "down", "router")


#: The roles of an MLP.
MLP_ROLES = ("gate", "up", "down", "router")


#: Roles whose output is the residual stream.
WRITERS = frozenset(("o", "down"))


@dataclass(frozen=True)
class FeatureRows:
    """The features of one site on the output axis of a fused projection.

    Attributes:
        offset: the index of the first feature.
        dims: (size, stride) pairs, outermost first; the product of the sizes is the number of features.

    Example:
        >>> FeatureRows(2, ((2, 6), (2, 1))).index().tolist()
        [2, 3, 8, 9]
    """

    offset: int
    dims: tuple[tuple[int, int], ...]

    def index(self, device: torch.device | None = None) -> Tensor:
        """The indices on the fused axis, in the order (head, component), on ``device``."""
        index = torch.full((), self.offset, device=device)
        for size, stride in self.dims:
            index = index.unsqueeze(-1) + torch.arange(0, size * stride, stride, device=device)
        return index.reshape(-1)

    def __str__(self) -> str:
        return f"{self.offset}+" + "".join(f"[{size}:{stride}]" for size, stride in self.dims)


@dataclass(frozen=True)
class Site:
    """A site: one projection, or one part of a fused projection, in one layer.

    Attributes:
        stack: the name of its tower of layers, such as ``"encoder"`` or ``"decoder.EncDecAttention"``.
            Stack, layer and role identify the site, also if module paths are renamed.
        layer: the index of the layer in its stack.
        role: ``"q"``, ``"k"``, ``"v"``, ``"o"`` of attention (``"q_a"`` and ``"kv_a"`` are the
            projections of latent attention that read the residual stream); ``"gate"``, ``"up"``,
            ``"down"`` of an MLP, ``"router"`` of a mixture of experts.
        path: the path of the projection module in the model.
        heads: the heads of this projection; for k and v, the key/value heads.
        query_heads: the query heads of the block; a multiple of ``heads``.
        head_dim: the components of one head.
        width: the size of the other side: of the residual stream, or of the latent that is read.
        writer: whether the residual stream is the output (o) and not the input (q, k, v).
        transposed: whether the weight is stored (in, out), as in transformers' Conv1D.
        parameter: the name of the weight in its module.
        rows: where the features lie, if the module holds other features too.
        fused: the features of the whole module on that side, if ``rows`` is set.
        weight_read_directly: whether the weight is read directly and the module's forward not called.
        tied_paths: paths of other modules that hold the same weight; they get the same update.
        experts: the number of experts packed in the weight's first axis; 0 for an ordinary weight.

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                     intermediate_size=64)
        >>> site = lortalib.nn.sites(BertModel(config))[0]
        >>> site.stack, site.layer, site.role, site.path, site.heads, site.head_dim, site.writer
        ('encoder', 0, 'q', 'encoder.layer.0.attention.self.query', 4, 8, False)
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
        """The triple (stack, layer, role), which identifies the site in a file."""
        return self.stack, self.layer, self.role

    @property
    def features(self) -> int:
        """The number of features: heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the module's whole weight, as stored."""
        shape = self.fused or self.features, self.width
        matrix = shape if self.writer == self.transposed else shape[::-1]
        return (self.experts, *matrix) if self.experts else matrix


def feature_rows(offset: int, *dims: tuple[int, int]) -> FeatureRows:
    """Make feature rows in their simplest form: sizes of 1 are dropped, adjacent dimensions joined."""
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
