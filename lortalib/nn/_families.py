"""What the rules cannot read off names and widths: exceptions, as rows of data.

A row names block classes by a regular expression on the class name. Users pass rows of their own for
remote-code models: ``sites(model, family=Family("MyAttention", fused="per_head"))``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Union

from ._site import Rows, part

#: From query heads, key/value heads, and the components of a query and of a value.
Layout = Callable[[int, int, int, int], dict[str, Rows]]


def contiguous(heads: int, kv_heads: int, qk: int, v: int) -> dict[str, Rows]:
    """All queries, then all keys, then all values."""
    q, k = heads * qk, kv_heads * qk
    return {"q": part(0, (q, 1)), "k": part(q, (k, 1)), "v": part(q + k, (kv_heads * v, 1))}


def per_head(heads: int, kv_heads: int, qk: int, v: int) -> dict[str, Rows]:
    """For each head its query, key and value."""
    outer = (heads, 2 * qk + v)
    return {
        "q": part(0, outer, (qk, 1)),
        "k": part(qk, outer, (qk, 1)),
        "v": part(2 * qk, outer, (v, 1)),
    }


def per_group(heads: int, kv_heads: int, qk: int, v: int) -> dict[str, Rows]:
    """For each key/value head the queries of its group, its key and its value."""
    queries = heads // kv_heads * qk
    outer = (kv_heads, queries + qk + v)
    return {
        "q": part(0, outer, (queries, 1)),
        "k": part(queries, outer, (qk, 1)),
        "v": part(queries + qk, outer, (v, 1)),
    }


def four_blocks_qvk(heads: int, kv_heads: int, qk: int, v: int) -> dict[str, Rows]:
    """Four blocks, each with the queries, the values and the keys of a quarter of the heads."""
    q, values = heads // 4 * qk, heads // 4 * v
    outer = (4, 2 * q + values)
    return {
        "q": part(0, outer, (q, 1)),
        "v": part(q, outer, (values, 1)),
        "k": part(q + values, outer, (q, 1)),
    }


LAYOUTS: dict[str, Layout] = {
    "contiguous": contiguous,
    "per_head": per_head,
    "per_group": per_group,
    "four_blocks_qvk": four_blocks_qvk,
}

Fused = Union[str, Callable[[Any], str], None]


@dataclass(frozen=True)
class Family:
    """A row: what holds for the blocks whose class name matches.

    Attributes:
        match: regular expression for the whole class name of a block.
        fused: layout of a fused q, k, v (or k, v) projection, one of ``LAYOUTS`` or a function from
            the block to one.
        leaves: role to child path, where the names mislead.
        skip: leave such modules out: they hold no softmax attention over projections.
        bypassed: whether the projections' weights are read directly, their forward not called, or a
            function from the block to that; found from the source where it is at hand.
        refuse: why such a block is not supported.

    Example:
        >>> Family(r"My\\w*Attention", fused="per_head").fits(type("MyFlashAttention", (), {})())
        True
    """

    match: str
    fused: Fused = None
    leaves: Mapping[str, str] = field(default_factory=dict)
    skip: bool = False
    bypassed: bool | Callable[[Any], bool] | None = None
    refuse: str = ""

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.match)

    def fits(self, module: object) -> bool:
        """Whether the row speaks of this module."""
        return bool(self._pattern.fullmatch(type(module).__name__))


def _falcon(block: Any) -> str:
    if block.new_decoder_architecture:
        return "per_group"
    return "contiguous" if block.multi_query else "per_head"


def _bigcode(block: Any) -> str:
    return "contiguous" if block.multi_query else "per_head"


FAMILIES: tuple[Family, ...] = (
    Family(r"GPTNeoX\w*Attention|(Persimmon|Fuyu)\w*Attention", fused="per_head"),
    Family(
        r"Bloom\w*Attention",
        fused="per_head",
        bypassed=lambda block: block.pretraining_tp > 1 and block.slow_but_exact,
    ),
    Family(r"DisentangledSelfAttention|Levit\w*Attention\w*", fused="per_head"),
    Family(r"Falcon\w*Attention\w*", fused=_falcon),
    Family(r"GPTBigCode\w*Attention\w*", fused=_bigcode),
    Family(r"CodeGen\w*Attention", fused="four_blocks_qvk"),
    Family(r"\w*VQ\w*AttnBlock", skip=True),  # convolutions inside an image tokeniser
    Family(r"Florence2VisionChannelAttention", skip=True),  # between channels, not tokens
    Family(r"SwiftFormerEfficientAdditiveAttention", skip=True),  # no softmax over keys
    Family(r"AriaCrossAttention", skip=True),  # its projections feed an inner MultiheadAttention
    Family(
        r"DiffLlama\w*Attention",
        refuse="its value heads are paired and subtracted, so heads of v and o are not those of q",
    ),
    Family(r"EsmFold2RowAttentionPooling", skip=True),  # scores without queries and keys
    Family(r"AXK2Attention", leaves={"q_b": "q_gate_proj"}),
    Family(r"NeoMMEAttention", leaves={"o": "output_projection.o_proj"}),
)
