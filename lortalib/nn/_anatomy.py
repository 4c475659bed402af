"""Where a model keeps its attention projections: from a model to a list of sites, as data.

Rules, not a list of models. A projection's role is read from its name, a block is a module that holds
projections with the roles q, k and v, and widths decide what names leave open (the output projection
must read heads * head_dim). Nothing is patched here, and no weight is read: meta devices will do.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

#: The roles of attention projections, in the order of the mode ``matrix``.
ROLES = ("q", "k", "v", "o")
WRITERS = frozenset("o")

_NOISE = frozenset(
    "proj projection project linear lin layer to head heads attn attention states w".split()
)
_ROLE_OF = {
    "q": "q", "query": "q", "queries": "q",
    "k": "k", "key": "k", "keys": "k",
    "v": "v", "value": "v", "values": "v",
    "o": "o", "out": "o", "output": "o", "dense": "o", "post": "o", "c": "o", "": "o",
}  # fmt: skip
_HEAD_COUNTS = (
    "num_attention_heads num_heads n_heads num_q_heads n_head heads num_attn_heads "
    "encoder_attention_heads decoder_attention_heads"
).split()
_HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "dim_head")
#: Mixers that are called attention but have no softmax over keys: never required.
_MIXERS = re.compile(r"mamba|deltanet|lightning|shortconv|rwkv|lstm|linearattention", re.I)


class AnatomyError(ValueError):
    """A model whose attention projections were not, or not all, found."""


@dataclass(frozen=True)
class Site:
    """One attention projection in one layer.

    Attributes:
        stack: which tower of layers: ``"encoder"``, ``"decoder.EncDecAttention"`` ... Together with
            layer and role it identifies the site, also where module paths are renamed.
        layer: index of the layer in its stack.
        role: ``"q"``, ``"k"``, ``"v"`` or ``"o"``.
        path: path of the projection module in the model.
        heads: heads of this projection: of keys and values for k and v.
        query_heads: heads of the block's queries; a multiple of ``heads``.
        head_dim: components of one head.
        width: size of the residual stream on the other side.
        writer: whether the residual stream is the output (o) and not the input (q, k, v).
        transposed: whether the weight is stored (in, out), as in transformers' Conv1D.
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

    @property
    def key(self) -> tuple[str, int, str]:
        """What identifies the site in a file: (stack, layer, role)."""
        return self.stack, self.layer, self.role

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the projection's weight, as stored."""
        shape = self.heads * self.head_dim, self.width
        return shape if self.writer == self.transposed else shape[::-1]


@dataclass(frozen=True)
class _Block:
    path: str
    leaves: dict[str, str]  # role -> path of the projection


def sites(model: nn.Module) -> list[Site]:
    """Every attention projection of a transformers model.

    Args:
        model: any transformers model whose attention keeps q, k, v and o in modules of their own;
            also on the meta device.

    Returns:
        Sites ordered by stack, layer and role.

    Raises:
        AnatomyError: no attention projection was found, or a block that looks like attention was
            not understood; the message names the blocks and what they hold.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                     intermediate_size=64)
        >>> site = sites(BertModel(config))[3]
        >>> site.role, site.path, site.heads, site.head_dim, site.writer
        ('o', 'encoder.layer.0.attention.output.dense', 4, 8, True)
    """
    modules = dict(model.named_modules())
    found: list[Site] = []
    blocks: list[_Block] = []
    refused: dict[str, str] = {}
    for block in _blocks(modules):
        try:
            found += _read_block(block, modules)
            blocks.append(block)
        except AnatomyError as error:
            refused[block.path] = str(error)
    refused |= _overlooked(modules, blocks, refused)
    if refused or not found:
        raise AnatomyError(_complaint(model, len(blocks), refused))
    return _number(found, blocks, _prefix(model))


def is_projection(module: nn.Module) -> bool:
    """A linear map of known widths: nn.Linear, a quantised stand-in, or transformers' Conv1D."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return True
    widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(width, int) for width in widths) and hasattr(module, "weight")


def widths(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a projection module."""
    if type(module).__name__ == "Conv1D":
        n_in, n_out = module.weight.shape
        return int(n_in), int(n_out)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def role_of(name: str) -> str | None:
    """The role that a projection's own name tells: q_proj, to_q, Wq, query, q_lin ... give "q"."""
    words = name.split("_")
    words = [re.sub(r"^W(?=[qkvo])", "", word).lower() for word in words]
    return _ROLE_OF.get("_".join(word for word in words if word not in _NOISE))


def _leaves(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, path below the module) of its projections, seen through one level of wrapping."""
    for name, child in module.named_children():
        if is_projection(child):
            yield name, name
        else:
            inner = [k for k, grandchild in child.named_children() if is_projection(grandchild)]
            if len(inner) == 1 and not _is_attention(child):
                yield name, f"{name}.{inner[0]}"


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return bool(re.search(r"attention|attn|MLA\b", name, re.I)) and not _MIXERS.search(name)


def _blocks(modules: dict[str, nn.Module]) -> Iterator[_Block]:
    for path, module in modules.items():
        roles: dict[str, list[str]] = defaultdict(list)
        for name, below in _leaves(module):
            role = role_of(name)
            if role is not None:
                roles[role].append(f"{path}.{below}" if path else below)
        if "q" in roles and ("k" in roles or _is_attention(module)):
            leaves = {role: roles[role][0] for role in "qkv" if role in roles}
            if output := _output(path, roles["o"], modules):
                leaves["o"] = output
            yield _Block(path, leaves)


def _output(path: str, candidates: Sequence[str], modules: dict[str, nn.Module]) -> str | None:
    """The output projection: in the block itself, else ``../output.dense`` as in BERT."""

    def preference(candidate: str) -> tuple[bool, bool]:
        name = candidate.removeprefix(path)
        return "o_proj" not in name and "out_proj" not in name, "out" not in name

    if candidates:
        return min(candidates, key=preference)
    parent = path.rpartition(".")[0]
    sibling = f"{parent}.output.dense" if parent else "output.dense"
    return sibling if sibling in modules and is_projection(modules[sibling]) else None


def _read_block(block: _Block, modules: dict[str, nn.Module]) -> list[Site]:
    """The sites of a block, widths checked against each other; layer and stack come later."""
    module = modules[block.path]
    width = {role: widths(modules[path]) for role, path in block.leaves.items()}
    heads = _head_count(module)
    q_out = width["q"][1]
    if heads is None or q_out % heads:
        raise AnatomyError(f"its queries are {q_out} wide, which {heads} heads do not divide")
    head_dim = q_out // heads
    stated = next((getattr(module, name) for name in _HEAD_DIMS if hasattr(module, name)), head_dim)
    if isinstance(stated, int) and stated != head_dim:
        raise AnatomyError(
            f"its queries are {q_out} wide, which is not {heads} heads of {stated} components"
        )
    missing = [role for role in ROLES if role not in block.leaves]
    if missing:
        raise AnatomyError(f"no projection for {', '.join(missing)} was recognised")
    k_out, v_out = width["k"][1], width["v"][1]
    kv_heads = k_out // head_dim
    if k_out % head_dim or heads % kv_heads or v_out % kv_heads:
        raise AnatomyError(
            f"{heads} query heads of {head_dim} do not fit keys of width {k_out} and values of "
            f"width {v_out}"
        )
    v_dim = v_out // kv_heads
    if width["o"][0] != heads * v_dim:
        raise AnatomyError(
            f"its output projection reads {width['o'][0]} features, not {heads} heads of {v_dim}"
        )
    counts = {"q": (heads, head_dim), "k": (kv_heads, head_dim), "v": (kv_heads, v_dim), "o": (heads, v_dim)}
    return [
        Site(
            stack=block.path,
            layer=0,
            role=role,
            path=block.leaves[role],
            heads=counts[role][0],
            query_heads=heads,
            head_dim=counts[role][1],
            width=width[role][1 if role in WRITERS else 0],
            writer=role in WRITERS,
            transposed=type(modules[block.leaves[role]]).__name__ == "Conv1D",
        )
        for role in ROLES
    ]


def _head_count(module: nn.Module) -> int | None:
    """Heads of the queries, from the module itself, else from its config."""
    for owner in (module, getattr(module, "config", None)):
        for name in _HEAD_COUNTS:
            heads = getattr(owner, name, None)
            if isinstance(heads, int) and heads > 0:
                return heads
    return None


def _overlooked(
    modules: dict[str, nn.Module], blocks: Sequence[_Block], refused: dict[str, str]
) -> dict[str, str]:
    """Modules that call themselves attention and hold weights, but took no part in any block."""
    claimed = {leaf for block in blocks for leaf in block.leaves.values()}
    known = [block.path for block in blocks] + list(refused)
    overlooked: dict[str, str] = {}
    for path, module in modules.items():
        if not (_is_attention(module) or isinstance(module, nn.MultiheadAttention)):
            continue
        if any(_within(path, other) or _within(other, path) for other in (*known, *overlooked)):
            continue
        weights = [name for name, p in module.named_parameters() if p.dim() > 1]
        if weights and not any(_within(leaf, path) for leaf in claimed):
            overlooked[path] = f"it holds {', '.join(weights[:6])}"
    return overlooked


def _within(path: str, other: str) -> bool:
    return path == other or other == "" or path.startswith(other + ".")


def _complaint(model: nn.Module, n_found: int, refused: dict[str, str]) -> str:
    name = type(model).__name__
    if not refused:
        return (
            f"no attention was found in {name}: looked for modules that hold projections for q, k "
            "and v (named q_proj, query, to_q, Wq, ...) and saw "
            f"{', '.join(n for n, _ in model.named_children()) or 'no submodules'}"
        )
    shown = list(refused.items())[:5]
    lines = [
        f"of {n_found + len(refused)} attention blocks in {name}, {len(refused)} were not understood; "
        "nothing was changed. Looked for a module with projections for q, k, v and an output "
        "projection that reads heads * head_dim features. Not understood:"
    ]
    modules = dict(model.named_modules())
    lines += [f"  {path or name} ({type(modules[path]).__name__}): {why}" for path, why in shown]
    if len(refused) > len(shown):
        lines.append(f"  ... and {len(refused) - len(shown)} more")
    return "\n".join(lines)


def _prefix(model: nn.Module) -> str:
    """The path of the bare model inside one with a head, so that both have the same stacks."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


_CONTAINERS = frozenset(
    "model transformer layers layer blocks block h self_attn attn attention self SelfAttention".split()
)


def _number(found: list[Site], blocks: Sequence[_Block], prefix: str) -> list[Site]:
    """Give every site its stack and layer: blocks whose paths differ in numbers only are a stack."""
    stacks: dict[str, list[str]] = defaultdict(list)
    for block in blocks:
        stacks[re.sub(r"(?<![^.])\d+(?![^.])", "*", block.path.removeprefix(prefix))].append(block.path)
    names = _stack_names(list(stacks))
    place: dict[str, tuple[str, int]] = {}
    for pattern, paths in stacks.items():
        indices = {path: [int(part) for part in path.split(".") if part.isdigit()] for path in paths}
        columns = [set(column) for column in zip(*indices.values())]
        varying = [k for k, column in enumerate(columns) if len(column) > 1] or [0]
        ordered = sorted(paths, key=lambda path: indices[path])
        for position, path in enumerate(ordered):
            index = indices[path]
            layer = index[varying[0]] if len(varying) == 1 and index else position
            place[path] = names[pattern], layer
    order = {name: k for k, name in enumerate(names.values())}
    numbered = [replace(site, stack=place[site.stack][0], layer=place[site.stack][1]) for site in found]
    return sorted(numbered, key=lambda s: (order[s.stack], s.layer, ROLES.index(s.role)))


def _stack_names(patterns: list[str]) -> dict[str, str]:
    """Short names: what is left of a path without numbers and the usual containers."""
    short = {}
    for pattern in patterns:
        words = [word for word in pattern.split(".") if word != "*" and word not in _CONTAINERS]
        short[pattern] = ".".join(words) or "layers"
    clash = {name for name in short.values() if list(short.values()).count(name) > 1}
    return {pattern: pattern if name in clash else name for pattern, name in short.items()}
