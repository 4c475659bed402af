"""Reads one attention block: its head counts, its widths and the rows of fused projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .rules import LAYOUTS, BlockRule
from .site import WRITERS, FeatureRows, Site, feature_rows
from .weights import children_read_directly, is_conv1d, widths

_HEAD_COUNTS = [
    "num_attention_heads",
    "num_heads",
    "n_heads",
    "num_q_heads",
    "n_head",
    "heads",
    "num_attn_heads",
    "nhead",
    "encoder_attention_heads",
    "decoder_attention_heads",
]


_HEAD_DIMS = [
    "head_dim",
    "attention_head_size",
    "key_value_proj_dim",
    "d_kv",
    "dim_head",
    "head_size",
    "qk_head_dim",
]


_KV_COUNTS = ["num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads"]


class BlockError(ValueError):
    """Raised for a block that was recognised as attention but whose sizes do not fit together."""


@dataclass(frozen=True)
class AttentionBlock:
    """An attention block: a module that holds the projections of one attention.

    Attributes:
        path: path of the module.
        extra: words that distinguish a second set of projections in the same module from the first.
        projections: path of the projection of each role: q, k, v, o, or fused qkv, kv, or the latent
            q_a, q_b, kv_a, kv_b.
        row: the rule that applies to its class.
        shares_output: whether the output projection belongs to another set of the same module.
    """

    path: str
    extra: tuple[str, ...]
    projections: dict[str, str]
    row: BlockRule
    shares_output: bool = False

    @property
    def name(self) -> str:
        """The path and the extra words; unique in the model."""
        return " ".join((self.path, *self.extra))


@dataclass(frozen=True)
class _Shape:
    """The head counts of a block, and the components of a head."""

    heads: int
    kv_heads: int
    qk: int
    v: int


def read_block(block: AttentionBlock, modules: dict[str, nn.Module]) -> list[Site]:
    """Make the sites of a block, whose widths are checked against each other; stack and layer are set later.

    Raises:
        BlockError: the widths do not fit together; the message says which.
    """
    if block.row.refuse:
        raise BlockError(block.row.refuse)
    module = modules[block.path]
    if isinstance(module, nn.MultiheadAttention):
        return _read_torch(block, module)
    width = {role: widths(modules[path]) for role, path in block.projections.items()}
    if "o" not in width:
        raise BlockError(
            "no output projection was recognised beside "
            + ", ".join(path.rpartition(".")[2] for path in block.projections.values())
        )
    reader = BlockReader(block, modules, width)
    if "kv_b" in width:
        sites = reader.latent()
    elif "qkv" in width:
        sites = reader.fused()
    else:
        sites = reader.apart()
    return [site for site in sites if not (block.shares_output and site.role == "o")]


class BlockReader:
    """Determines the shape of a block and makes its sites."""

    def __init__(
        self,
        block: AttentionBlock,
        modules: dict[str, nn.Module],
        width: dict[str, tuple[int, int]],
    ) -> None:
        self.block, self.modules, self.width = block, modules, width
        self.module = modules[block.path]
        # A second set of projections has the same heads as the first, but its own number of components.
        self.head_dim = None if block.extra else self._stated(_HEAD_DIMS, own_only=True)
        self.heads = self._head_count()

    def apart(self) -> list[Site]:
        """Read q, k and v in separate modules, or k and v fused; k and v can be missing."""
        q_out = self.width["q" if "q" in self.width else "k"][
            1
        ]  # learned queries have no projection
        o_in = self.width["o"][0]
        if q_out % self.heads:
            raise BlockError(
                f"its queries are {q_out} wide, which {self.heads} heads do not divide"
            )
        qk = q_out // self.heads
        rows: dict[str, FeatureRows] = {}
        if self.head_dim and qk == 2 * self.head_dim and o_in == self.heads * self.head_dim:
            qk = self.head_dim  # each head holds its query, then its gate
            rows["q"] = feature_rows(0, (self.heads, 2 * qk), (qk, 1))
        elif self.head_dim and qk != self.head_dim:
            raise BlockError(
                f"its queries are {q_out} wide, which is not {self.heads} heads of {self.head_dim} "
                "components"
            )
        if "kv" in self.width:
            return self._fused_kv(qk, rows)
        k_out = self.width["k"][1] if "k" in self.width else qk
        if k_out % qk or self.heads % (k_out // qk):
            raise BlockError(
                f"{self.heads} query heads of {qk} components do not fit keys of width {k_out}"
            )
        kv_heads = k_out // qk
        v_out = self.width["v"][1] if "v" in self.width else kv_heads * (o_in // self.heads)
        outputs, offset = self.heads * (v_out // kv_heads), self.block.row.output_offset
        if offset is not None and offset + outputs < o_in:  # it reads the MLP too, as in Flux
            rows["o"] = feature_rows(offset, (outputs, 1))
        elif v_out % kv_heads or o_in != outputs:
            raise BlockError(
                f"its output projection reads {o_in} features, which is not {self.heads} heads with "
                f"values of width {v_out} in {kv_heads} heads"
            )
        shape = _Shape(self.heads, kv_heads, qk, v_out // kv_heads)
        return [
            self._site(role, role, shape, rows.get(role)) for role in "qkvo" if role in self.width
        ]

    def fused(self) -> list[Site]:
        """Read q, k and v that are fused in one projection."""
        o_in, total = self.width["o"][0], self.width["qkv"][1]
        if o_in % self.heads:
            raise BlockError(f"{self.heads} heads do not divide the {o_in} features it puts out")
        name, v = self._layout(), o_in // self.heads
        if name == "per_head":  # the only layout in which values may have a size of their own
            kv_heads, qk = self.heads, (total // self.heads - v) // 2
        else:
            kv_heads, qk = (total - o_in) // (2 * v), v
        if (
            min(kv_heads, qk) < 1
            or self.heads % kv_heads
            or total != ((self.heads + kv_heads) * qk + kv_heads * v)
        ):
            raise BlockError(
                f"{self.heads} heads with values of {v} components do not fit a fused projection of "
                f"{total} features in the layout {name!r}"
            )
        layout = LAYOUTS[name](self.heads, kv_heads, qk, v)
        shape = _Shape(self.heads, kv_heads, qk, v)
        sites = [self._site(role, "qkv", shape, layout[role]) for role in "qkv"]
        return [*sites, self._site("o", "o", shape, None)]

    def latent(self) -> list[Site]:
        """Read multi-head latent attention, whose queries, keys and values are computed from latents."""
        q = "q_b" if "q_b" in self.width else "q"
        heads, o_in = self.heads, self.width["o"][0]
        q_out, kv_out = self.width[q][1], self.width["kv_b"][1]
        if q_out % heads or kv_out % heads or o_in % heads:
            raise BlockError(f"{heads} heads do not divide the widths {q_out}, {kv_out}, {o_in}")
        unit, v = kv_out // heads, o_in // heads
        qk = own = q_out // heads
        if self.head_dim and own == self.head_dim + v:
            qk = self.head_dim  # each head holds its query, then a gate for its values
        q_rows = feature_rows(0, (heads, own), (qk, 1)) if qk != own else None
        nope = unit - v
        if nope < 1 or nope > qk:
            raise BlockError(f"keys and values of {unit} components do not fit values of {v}")
        shape = _Shape(heads, heads, qk, v)
        sites = [
            self._site("q", q, shape, q_rows),
            self._site(
                "k",
                "kv_b",
                _Shape(heads, heads, nope, v),
                feature_rows(0, (heads, unit), (nope, 1)),
            ),
            self._site("v", "kv_b", shape, feature_rows(nope, (heads, unit), (v, 1))),
            self._site("o", "o", shape, None),
        ]
        for role in ("q_a", "kv_a"):
            if role in self.width:
                one = _Shape(1, 1, self.width[role][1], self.width[role][1])
                sites.append(self._site(role, role, one, None))
        return sites

    def _fused_kv(self, qk: int, rows: dict[str, FeatureRows]) -> list[Site]:
        total, o_in = self.width["kv"][1], self.width["o"][0]
        per_head = self._layout() == "per_head"
        kv_heads = self.heads if per_head else total // (2 * qk)
        v = o_in // self.heads
        if min(kv_heads, v) < 1 or self.heads % kv_heads or total != kv_heads * (qk + v):
            raise BlockError(
                f"{self.heads} query heads of {qk} do not fit fused keys and values of width {total}"
            )
        shape = _Shape(self.heads, kv_heads, qk, v)
        outer = (kv_heads, qk + v)
        k_rows = (
            feature_rows(0, outer, (qk, 1)) if per_head else feature_rows(0, (kv_heads * qk, 1))
        )
        v_rows = (
            feature_rows(qk, outer, (v, 1))
            if per_head
            else feature_rows(kv_heads * qk, (kv_heads * v, 1))
        )
        return [
            self._site("q", "q", shape, rows.get("q")),
            self._site("k", "kv", shape, k_rows),
            self._site("v", "kv", shape, v_rows),
            self._site("o", "o", shape, None),
        ]

    def _layout(self) -> str:
        """Find the name of the layout of a fused projection."""
        fused = self.block.row.fused
        name = fused(self.module) if callable(fused) else fused
        if name is None:
            if not self._is_known():
                raise BlockError(
                    "it has a fused q, k, v projection, whose layout cannot be read off; declare it "
                    f"with rules=BlockRule({type(self.module).__name__!r}, fused=...), one of "
                    f"{', '.join(map(repr, LAYOUTS))}"
                )
            name = "contiguous"
        if name not in LAYOUTS:
            raise BlockError(f"unknown layout {name!r}; choose {', '.join(map(repr, LAYOUTS))}")
        return name

    def _site(self, role: str, leaf: str, shape: _Shape, rows: FeatureRows | None) -> Site:
        path = self.block.projections[leaf]
        n_in, n_out = self.width[leaf]
        writer = role in WRITERS
        heads = shape.kv_heads if role in "kv" else shape.heads
        dim = shape.v if role in "vo" else shape.qk
        return Site(
            stack="",
            layer=0,
            role=role,
            path=path,
            heads=heads,
            query_heads=shape.heads,
            head_dim=dim,
            width=n_out if writer else n_in,
            writer=writer,
            transposed=is_conv1d(self.modules[path]),
            rows=rows,
            fused=(n_in if writer else n_out) if rows is not None else None,
            weight_read_directly=self._is_bypassed(path),
        )

    def _head_count(self) -> int:
        """Find the number of query heads; a class of transformers that states none has one head."""
        heads = self._stated(_HEAD_COUNTS)
        queries = self.width.get("q")
        if heads is None and queries and self.head_dim and queries[1] % self.head_dim == 0:
            return queries[1] // self.head_dim
        if heads is None and not self._is_known():
            raise BlockError(f"it states no head count (looked for {', '.join(_HEAD_COUNTS)})")
        return heads or 1

    def _is_known(self) -> bool:
        return type(self.module).__module__.startswith("transformers.")

    def _stated(self, names: list[str], own_only: bool = False) -> int | None:
        """Return the first of these attributes that is a positive integer, on the module or its config."""
        owners = (self.module,) if own_only else (self.module, getattr(self.module, "config", None))
        for owner in owners:
            for name in names:
                value = getattr(owner, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    def _is_bypassed(self, path: str) -> bool:
        weight_read_directly = self.block.row.weight_read_directly
        if weight_read_directly is not None:
            return (
                weight_read_directly(self.module)
                if callable(weight_read_directly)
                else weight_read_directly
            )
        leaf = path.removeprefix(f"{self.block.path}.").partition(".")[0]
        return leaf in children_read_directly(type(self.module))  # type: ignore[arg-type]


def _read_torch(block: AttentionBlock, module: nn.MultiheadAttention) -> list[Site]:
    """Read torch.nn.MultiheadAttention, which uses its weights without calling the projections' forward."""
    heads, dim, width = module.num_heads, module.head_dim, module.embed_dim
    common: dict[str, Any] = {
        "stack": "", "layer": 0, "heads": heads, "query_heads": heads, "head_dim": dim,
        "weight_read_directly": True,
    }  # fmt: skip
    sites = []
    for k, role in enumerate("qkv"):
        if module.in_proj_weight is not None:
            sites.append(
                Site(role=role, path=block.path, width=width, writer=False, parameter="in_proj_weight",
                     rows=feature_rows(k * width, (width, 1)), fused=3 * width, **common)
            )  # fmt: skip
        else:
            name = f"{role}_proj_weight"
            n_in = int(getattr(module, name).shape[1])
            sites.append(
                Site(role=role, path=block.path, width=n_in, writer=False, parameter=name, **common)
            )
    return [
        *sites,
        Site(role="o", path=f"{block.path}.out_proj", width=width, writer=True, **common),
    ]
