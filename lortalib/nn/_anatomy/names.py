"""Reads the names and types of modules: projections, their roles, attention classes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from .weights import is_projection
from .wrappers import unwrapped

#: The attribute of a model that holds its adapters.
ATTRIBUTE = "lortalib"


_NOISE = frozenset(
    "proj projection project linear lin layer to head heads attn attention att states w".split()
)


_ROLE_WORDS = {
    "q": "q", "query": "q", "queries": "q",
    "k": "k", "key": "k", "keys": "k",
    "v": "v", "value": "v", "values": "v",
    "qkv": "qkv", "kv": "kv", "qk": "qk",
}  # fmt: skip


_OUTPUT_WORDS = frozenset(("o", "out", "output", "dense", "post", "c"))


_WHOLE = {
    "query_key_value": "qkv", "c_attn": "qkv", "att_proj": "qkv", "in_proj": "qkv",
    "queries_keys_values": "qkv", "key_value": "kv", "keys_values": "kv",
}  # fmt: skip


#: Mixers without a softmax over keys, or without queries and keys at all; they are skipped.
#: (KimiLinearAttention, of the model Kimi Linear, is softmax attention.)
_MIXERS = re.compile(
    r"mamba|delta_?(net|attention)|lightning|shortconv|rwkv|lstm|(?<!kimi)linear_?(self)?attention|retention|gatedlinear"
    r"|multiscaledeformable|gatedattention|attentiongru",
    re.I,
)


_ATTENTION = re.compile(r"(?:[aA]ttention|[aA]ttn|MLA)(?![a-z])(?!\w*(?:MLP|Bias|Residual|Norm)$)")


def is_attention(module: nn.Module) -> bool:
    """Return True if the class is named attention and is not a mixer of another kind."""
    name = type(module).__name__
    return bool(_ATTENTION.search(name)) and not is_mixer(module)


def is_mixer(module: nn.Module) -> bool:
    """Return True if the class name is that of a mixer without softmax attention."""
    return bool(_MIXERS.search(type(module).__name__))


def role_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Split a projection's own name into its role and the remaining words.

    ``q_proj``, ``to_q``, ``Wq``, ``query`` are ``("q", ())``; ``query_global`` is
    ``("q", ("global",))``; ``q_a_proj`` is ``("q", ("a",))``; an output projection ``("o", ...)``.
    """
    words = [re.sub(r"^W(?=qkv$|[qkvo]$)", "", word).lower() for word in name.split("_")]
    if "_".join(words) in _WHOLE:
        return _WHOLE["_".join(words)], ()
    words = [word for word in words if word and word not in _NOISE]
    roles = [word for word in words if word in _ROLE_WORDS]
    if len(roles) == 1:
        return _ROLE_WORDS[roles[0]], tuple(word for word in words if word not in _ROLE_WORDS)
    if not roles and (not words or set(words) & _OUTPUT_WORDS):
        return "o", tuple(word for word in words if word not in _OUTPUT_WORDS)
    if roles == ["query", "key", "value"]:
        return "qkv", ()
    return None


def projection_children(module: nn.Module) -> Iterator[tuple[str, str]]:
    """List the projections of a module as (name, path below the module), also within one wrapper."""
    for name, child in _children(module):
        if is_projection(child):
            yield name, name
        elif not is_attention(child):
            inner = [k for k, grandchild in _children(child) if is_projection(grandchild)]
            if len(inner) == 1:
                yield name, f"{name}.{inner[0]}"


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, unwrapped(child)) for name, child in module.named_children())
