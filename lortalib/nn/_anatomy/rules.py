"""Lists the exceptions, which names and widths do not show, as rows of data.

A row selects block classes by a regular expression on the class name. Users pass their own rows for
remote-code models: ``sites(model, rules=BlockRule("MyAttention", fused="per_head"))``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Union

from ..._kinds import FLAG, FUNCTION, MAPPING, TEXT, Kind, are, is_integer
from .site import FeatureRows, feature_rows

#: A function from query heads, key/value heads, and the components of a query and of a value.
Layout = Callable[[int, int, int, int], dict[str, FeatureRows]]


def contiguous(heads: int, kv_heads: int, qk: int, v: int) -> dict[str, FeatureRows]:
    """Lay out all queries, then all keys, then all values."""
    q, k = heads * qk, kv_heads * qk
    return {
        "q": feature_rows(0, (q, 1)),
        "k": feature_rows(q, (k, 1)),
        "v": feature_rows(q + k, (kv_heads * v, 1)),
    }


def per_head(heads: int, kv_heads: int, qk: int, v: int) -> dict[str, FeatureRows]:
    """Lay out head by head: query, key and value."""
    outer = (heads, 2 * qk + v)
    return {
        "q": feature_rows(0, outer, (qk, 1)),
        "k": feature_rows(qk, outer, (qk, 1)),
        "v": feature_rows(2 * qk, outer, (v, 1)),
    }


def per_group(heads: int, kv_heads: int, qk: int, v: int) -> dict[str, FeatureRows]:
    """Lay out each key/value head: the queries of its group, its key and its value."""
    queries = heads // kv_heads * qk
    outer = (kv_heads, queries + qk + v)
    return {
        "q": feature_rows(0, outer, (queries, 1)),
        "k": feature_rows(queries, outer, (qk, 1)),
        "v": feature_rows(queries + qk, outer, (v, 1)),
    }


def four_blocks_qvk(heads: int, kv_heads: int, qk: int, v: int) -> dict[str, FeatureRows]:
    """Lay out four blocks, each with queries, values and keys of a quarter of the heads."""
    q, values = heads // 4 * qk, heads // 4 * v
    outer = (4, 2 * q + values)
    return {
        "q": feature_rows(0, outer, (q, 1)),
        "v": feature_rows(q, outer, (values, 1)),
        "k": feature_rows(q + values, outer, (q, 1)),
    }


LAYOUTS: dict[str, Layout] = {
    "contiguous": contiguous,
    "per_head": per_head,
    "per_group": per_group,
    "four_blocks_qvk": four_blocks_qvk,
}


Fused = Union[str, Callable[[Any], str], None]


@dataclass(frozen=True)
class BlockRule:
    """A rule: facts about the blocks whose class name matches.

    Attributes:
        match: a regular expression for the whole class name of a block, alone or behind its module, as in
            ``"timm.layers.attention.Attention"``.
        fused: the layout of a fused q, k, v (or k, v) projection: one of ``LAYOUTS``, or a function
            from the block to one.
        projections: a mapping from role to child path, if the names mislead.
        skip: whether to skip such modules, because they hold no softmax attention over projections.
        weight_read_directly: whether the block reads the projections' weights directly, without calling
            their forward; or a function from the block to that. By default lortalib reads the block's
            source to find out.
        output_offset: the position of the heads in what the output projection reads, if that is more than
            the heads.
        refuse: the reason why such a block is not supported.

    Raises:
        TypeError: a value of another kind.
        ValueError: ``match`` is no regular expression.

    Example:
        >>> BlockRule(r"My\\w*Attention", fused="per_head").fits(type("MyFlashAttention", (), {})())
        True
    """

    match: str
    fused: Fused = None
    projections: Mapping[str, str] = field(default_factory=dict)
    skip: bool = False
    weight_read_directly: bool | Callable[[Any], bool] | None = None
    output_offset: int | None = None
    refuse: str = ""

    def __post_init__(self) -> None:
        for name, kind in _FIELDS.items():
            kind.check(name, getattr(self, name))
        if isinstance(self.fused, str) and self.fused not in LAYOUTS:
            layouts = ", ".join(map(repr, LAYOUTS))
            raise ValueError(f"unknown layout {self.fused!r} in fused=; choose {layouts}")
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(
                f"match must be a regular expression; found {self.match!r}: {error}"
            ) from None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.match)

    def fits(self, module: object) -> bool:
        """Return True if the rule applies to ``module``, by the name of its class."""
        kind = type(module)
        names = kind.__name__, f"{kind.__module__}.{kind.__name__}"
        return any(self._pattern.fullmatch(name) for name in names)


#: The kinds of the attributes of a rule.
_FIELDS = {
    "match": TEXT,
    "fused": Kind(
        "the name of a layout, a function, or None",
        lambda value: value is None or callable(value) or isinstance(value, str),
    ),
    "projections": MAPPING,
    "skip": FLAG,
    "weight_read_directly": Kind(
        "True, False, a function, or None",
        lambda value: value is None or FLAG.fits(value) or FUNCTION.fits(value),
    ),
    "output_offset": Kind(
        "an integer of at least 0, or None",
        lambda value: value is None or (is_integer(value) and value >= 0),
    ),
    "refuse": TEXT,
}

#: The kind of an argument that gives rules.
RULES_KIND = Kind(
    "a lortalib.nn.BlockRule, or a list of these",
    lambda value: (
        isinstance(value, BlockRule) or are(lambda each: isinstance(each, BlockRule))(value)
    ),
)


def _falcon(block: Any) -> str:
    if block.new_decoder_architecture:
        return "per_group"
    return "contiguous" if block.multi_query else "per_head"


def _bigcode(block: Any) -> str:
    return "contiguous" if block.multi_query else "per_head"


RULES: tuple[BlockRule, ...] = (
    # timm has many classes called Attention, of which some have another layout or are no softmax attention.
    BlockRule(
        r"timm\.layers\.(attention\.Attention(Rope)?|attention_pool\.AttentionPoolLatent)"
        r"|timm\.models\.(beit|eva|vision_transformer_(sam|relpos))\.\w*Attention\w*"
        r"|timm\.models\.swin_transformer(_v2|_v2_cr)?\.Window(MultiHead)?Attention"
        r"|timm\.models\.(fastvit|metaformer|pvt_v2|volo)\.(Class)?Attention"
        r"|timm\.models\.(hiera\.MaskUnit|hieradet_sam2\.MultiScale|mvitv2\.MultiScale|davit\.Window)Attention"
        r"|timm\.models\.twins\.\w+Attn",
        fused="contiguous",
    ),
    BlockRule(
        r"timm\.models\.maxxvit\.AttentionCl",
        fused=lambda block: "per_head" if block.head_first else "contiguous",
    ),
    # The widths refuse it where values have other head sizes than keys.
    BlockRule(r"timm\.models\.tiny_vit\.Attention", fused="per_head"),
    BlockRule(
        r"timm\.models\.crossvit\.CrossAttention",
        projections={"q": "wq", "k": "wk", "v": "wv", "o": "proj"},
    ),
    # They attend over channels, or weigh neighbours and branches without queries and keys.
    BlockRule(
        r"timm\.models\.(davit\.Channel|volo\.Outlook|nextvit\.Conv)Attention"
        r"|timm\.models\.edgenext\.CrossCovarianceAttn"
        r"|timm\.layers\.(split_attn\.SplitAttn|selective_kernel\.SelectiveKernelAttn)",
        skip=True,
    ),
    BlockRule(
        r"timm\.models\.nest\.Attention",
        refuse="its output projection reads the components of all heads in turn, not head after head",
    ),
    BlockRule(r"GPTNeoX\w*Attention|(Persimmon|Fuyu)\w*Attention", fused="per_head"),
    BlockRule(
        r"Bloom\w*Attention",
        fused="per_head",
        weight_read_directly=lambda block: block.pretraining_tp > 1 and block.slow_but_exact,
    ),
    BlockRule(r"DisentangledSelfAttention|Levit\w*Attention\w*", fused="per_head"),
    BlockRule(r"Falcon\w*Attention\w*", fused=_falcon),
    BlockRule(r"GPTBigCode\w*Attention\w*", fused=_bigcode),
    BlockRule(r"CodeGen\w*Attention", fused="four_blocks_qvk"),
    BlockRule(r"\w*VQ\w*AttnBlock", skip=True),  # convolutions inside an image tokeniser
    BlockRule(r"Florence2VisionChannelAttention", skip=True),  # between channels, not tokens
    BlockRule(r"SwiftFormerEfficientAdditiveAttention", skip=True),  # has no softmax over keys
    BlockRule(r"AriaCrossAttention", skip=True),  # its projections feed an inner MultiheadAttention
    BlockRule(
        r"DiffLlama\w*Attention",
        refuse="its value heads are paired and subtracted, so heads of v and o are not those of q",
    ),
    BlockRule(r"EsmFold2RowAttentionPooling", skip=True),  # its scores have no queries and keys
    BlockRule(r"AXK2Attention", projections={"q_b": "q_gate_proj"}),
    BlockRule(r"FluxAttention", output_offset=0),  # of single blocks: the heads, then the MLP
    BlockRule(r"NeoMMEAttention", projections={"o": "output_projection.o_proj"}),
)
