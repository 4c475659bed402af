"""Where a model keeps its attention projections: from a model to a list of sites, as data.

Rules, not a list of models. A projection's role is read from its name, a block is a module that holds
projections with the roles q, k and v, and widths decide what names leave open (the output projection
must read heads * head_dim). Nothing is patched here, and no weight is read: meta devices will do.
What rules cannot know is a row in ``_families``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from ._blocks import AttentionBlock, BlockError, read_block
from ._families import RULES, BlockRule
from ._mlp import read_mlps
from ._names import (
    is_attention,
    is_mixer,
    is_projection,
    original_weight,
    projection_children,
    role_of,
)
from ._site import ROLES, FeatureRows, Site


class UnsupportedModelError(ValueError):
    """A model whose attention projections were not, or not all, found."""


def sites(model: nn.Module, *, rules: BlockRule | Sequence[BlockRule] = ()) -> SiteList:
    """Every attention projection of a transformers model.

    Args:
        model: any transformers model; also on the meta device.
        rules: rows that say what the rules cannot read off, for remote-code models; they go before
            the library's own.

    Returns:
        Sites ordered by stack, layer and role; printed, the list is a table by stack.

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
    check_model(model)
    rules = ((rules,) if isinstance(rules, BlockRule) else tuple(rules)) + RULES
    found, refused = _read(model, rules)
    if refused or not found:
        raise UnsupportedModelError(_refusal_text(model, len(found), refused))
    return _listed(model, found)


def understood_sites(model: nn.Module) -> SiteList:
    """The projections of those attention blocks that are understood, however many are not.

    For callers that say themselves which modules they want, such as PEFT.
    """
    found, refused = _read(model, RULES)
    return _listed(model, {k: v for k, v in found.items() if k.partition(" ")[0] not in refused})


def _read(
    model: nn.Module, rules: Sequence[BlockRule]
) -> tuple[dict[str, list[Site]], dict[str, str]]:
    """Sites by name of their block, and why by path of the blocks that were not understood."""
    modules = dict(model.named_modules())
    found: dict[str, list[Site]] = {}
    refused: dict[str, str] = {}
    for block in _blocks(modules, rules):
        try:
            found[block.name] = read_block(block, modules)
        except BlockError as error:
            refused[block.path] = str(error)
    refused |= _overlooked(modules, found, refused, rules)
    refused |= _claimed_twice(found)
    return found, refused


def _listed(model: nn.Module, found: dict[str, list[Site]]) -> SiteList:
    return SiteList(_number(_tie(found, dict(model.named_modules())), _prefix(model)))


def check_model(model: object) -> None:
    """Refuse anything but a module.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a model, a torch.nn.Module; found {model!r}. Load it first, for instance with "
            "transformers.AutoModel.from_pretrained"
        )


class SiteList(list[Site]):
    """A list of sites that prints as a table, one row for each stack and shape."""

    def __str__(self) -> str:
        rows = [("stack", "layers", "role", "heads", "head_dim", "width", "first module", "rows")]
        alike: dict[tuple[object, ...], list[Site]] = defaultdict(list)
        for site in self:
            key = (site.stack, site.role, site.heads, site.head_dim, site.width, str(site.rows))
            alike[key].append(site)
        for members in alike.values():
            site = members[0]
            rows.append(
                (
                    site.stack,
                    str(len(members)),
                    site.role + (" (weight)" if site.weight_read_directly else ""),
                    str(site.heads),
                    str(site.head_dim),
                    f"{site.width:,}",
                    site.path,
                    str(site.rows) if site.rows else "all",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows)]
        cells = ("  ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip() for row in rows)
        return "\n".join(cells)


def mlp_sites(model: nn.Module) -> SiteList:
    """Every MLP projection that is recognised: gate, up (readers) and down (writers).

    Experts packed as 3-D parameters are sites with ``experts`` set; shared experts and MLPs in lists
    are ordinary ones. Their stacks carry the names of the towers that they stand in.

    Raises:
        AnatomyError: no MLP was found.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2,
        ...                      intermediate_size=16)
        >>> [(site.role, site.weight_shape) for site in mlp_sites(LlamaModel(config))]
        [('gate', (16, 8)), ('up', (16, 8)), ('down', (8, 16))]
    """
    check_model(model)
    found = read_mlps(dict(model.named_modules()))
    if not found:
        raise UnsupportedModelError(
            f"no MLP was found in {type(model).__name__}: looked for modules that hold an up- and a "
            "down-projection (gate_proj/up_proj/down_proj, fc1/fc2, intermediate/output.dense, ...) "
            "of widths that fit each other, or packed experts"
        )
    return _listed(model, found)


def _blocks(modules: dict[str, nn.Module], rules: Sequence[BlockRule]) -> Iterator[AttentionBlock]:
    first = {id(module): path for path, module in reversed(modules.items())}
    for path, module in modules.items():
        row = next((row for row in rules if row.fits(module)), BlockRule(""))
        if row.skip or is_mixer(module):
            continue
        if isinstance(module, nn.MultiheadAttention):
            yield AttentionBlock(path, (), {}, row)
            continue
        sets: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        declared = {
            f"{path}.{below}" if path else below: role for role, below in row.projections.items()
        }
        for full, role in declared.items():
            if full in modules:
                sets[()][role].append(full)
        for name, below in projection_children(module):
            full = first[id(module.get_submodule(below))]  # a module can hang in two places
            role, extra = role_of(name) or ("", ())
            if full in declared:
                continue
            latent = extra[:1] if role in ("q", "kv") and extra[:1] in (("a",), ("b",)) else ()
            if latent:
                role, extra = f"{role}_{extra[0]}", ()
            sets[() if role == "o" else extra][role].append(full)
        outputs = sets[()].get("o", [])
        if "q" in sets[()] and "qkv" in sets[()]:  # GPT-2's cross attention: c_attn holds k and v
            sets[()]["kv"] = sets[()].pop("qkv")
        taken: set[str] = set()
        for extra, roles in sets.items():
            held = {role: paths[0] for role, paths in roles.items() if role and role != "o"}
            if not _is_block(set(held), module, bool(extra)):
                continue
            output = _output(path, extra, outputs, modules)
            shares_output = output in taken  # a second set that shares the output of the first
            taken.add(output or "")
            yield AttentionBlock(
                path, extra, held | ({"o": output} if output else {}), row, shares_output
            )


def _is_block(roles: set[str], module: nn.Module, second: bool) -> bool:
    if {"q", "k", "v"} <= roles:
        return True
    if second or not is_attention(module):
        return False
    return bool(
        roles >= {"qkv"}
        or roles >= {"q", "kv"}
        or (roles >= {"kv_b"} and roles & {"q", "q_b"})
        or roles in ({"q"}, {"q", "k"}, {"k", "v"})
    )


def _output(
    path: str, extra: Sequence[str], candidates: Sequence[str], modules: dict[str, nn.Module]
) -> str | None:
    """The output projection: in the block itself, else ``../output.dense`` as in BERT."""

    def preference(candidate: str) -> tuple[bool, bool]:
        name = candidate.removeprefix(path)
        return "o_proj" not in name and "out_proj" not in name, "out" not in name

    if candidates:
        return min(candidates, key=preference)
    parent, _, own = path.rpartition(".")
    dot = f"{parent}." if parent else ""
    words = "_".join((*extra, "output"))
    for sibling in (
        f"{dot}{words}.dense",
        f"{dot}output.dense",
        f"{dot}{own}_output.dense",
        f"{dot}output",
    ):
        if sibling in modules and is_projection(modules[sibling]):
            return sibling
    return next(
        (
            f"{dot}{name}"
            for name, child in modules[parent].named_children()
            if is_projection(child) and (role_of(name) or ("",))[0] == "o"
        ),
        None,
    )


def _overlooked(
    modules: dict[str, nn.Module],
    found: dict[str, list[Site]],
    refused: dict[str, str],
    rules: Sequence[BlockRule],
) -> dict[str, str]:
    """Modules that call themselves attention and hold weights, but took no part in any block."""
    claimed = {site.path for members in found.values() for site in members}
    known = {name.partition(" ")[0] for name in found} | set(refused)
    parents = {path.rpartition(".")[0] for path in claimed} - {""}
    inside = {path for leaf in claimed | known for path in _ancestors(leaf)}
    overlooked: dict[str, str] = {}
    for path, module in modules.items():
        if not is_attention(module) or path in inside or path in claimed:
            continue
        if any(row.skip and row.fits(module) for row in rules):
            continue
        if any(_within(path, other) for other in (*known, *overlooked, *parents)):
            continue
        weights = [name for name, p in module.named_parameters() if p.dim() > 1]
        if weights:
            overlooked[path] = f"it holds {', '.join(weights[:6])}"
    return overlooked


def _claimed_twice(found: dict[str, list[Site]]) -> dict[str, str]:
    """Blocks that take a whole projection for two roles: two shares would not fit its output."""
    roles: dict[tuple[str, str], str] = {}
    twice: dict[str, str] = {}
    for name, members in found.items():
        for site in members:
            other = roles.setdefault((site.path, site.parameter), site.role)
            if site.rows is None and other != site.role:
                twice[name.partition(" ")[0]] = (
                    f"{site.path} would have the roles {other}, {site.role}"
                )
    return twice


def _ancestors(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _within(path: str, other: str) -> bool:
    return path == other or not other or path.startswith(f"{other}.")


def _refusal_text(model: nn.Module, n_found: int, refused: dict[str, str]) -> str:
    name = type(model).__name__
    if not refused:
        return (
            f"no attention was found in {name}: looked for modules that hold projections for q, k "
            "and v (named q_proj, query, to_q, Wq, qkv, ...) and saw "
            f"{', '.join(n for n, _ in model.named_children()) or 'no submodules'}"
        )
    modules = dict(model.named_modules())
    lines = [
        f"of {n_found + len(refused)} attention blocks in {name}, {len(refused)} were not "
        "understood; nothing was changed. Looked for a module with projections for q, k, v (apart or "
        "fused) and an output projection that reads heads * head_dim features. Not understood:"
    ]
    shown = list(refused.items())[:5]
    lines += [f"  {path or name} ({type(modules[path]).__name__}): {why}" for path, why in shown]
    if len(refused) > len(shown):
        lines.append(f"  ... and {len(refused) - len(shown)} more")
    lines.append(
        "A row rules=lortalib.nn.BlockRule(...) tells what cannot be read off; see docs/models.md"
    )
    return "\n".join(lines)


def _prefix(model: nn.Module) -> str:
    """The path of the bare model inside one with a head, so that both have the same stacks."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


_CONTAINERS = frozenset(
    [
        "model",
        "transformer",
        "layers",
        "layer",
        "blocks",
        "block",
        "h",
        "self_attn",
        "attn",
        "attention",
        "self",
        "SelfAttention",
        "mlp",
        "DenseReluDense",
        "experts",
        "feed_forward",
        "ffn",
    ]
)


def _tie(found: dict[str, list[Site]], modules: dict[str, nn.Module]) -> dict[str, list[Site]]:
    """Let modules that hold the same parameter be one site: what is tied in the base stays tied."""
    first: dict[tuple[int, str, FeatureRows | None], tuple[str, int]] = {}
    tied: dict[str, list[Site]] = {name: [] for name in found}
    for name, members in found.items():
        for site in members:
            weight = original_weight(modules[site.path], site.parameter)
            key = (id(weight), site.role, site.rows)
            if key in first:
                owner, position = first[key]
                known = tied[owner][position]
                if site.path != known.path:
                    tied[owner][position] = replace(
                        known, tied_paths=(*known.tied_paths, site.path)
                    )
            else:
                first[key] = name, len(tied[name])
                tied[name].append(site)
    return {name: members for name, members in tied.items() if members}


@dataclass
class Stack:
    """Blocks whose paths differ in numbers only."""

    names: list[str] = field(default_factory=list)

    def layers(self) -> dict[str, int]:
        """Layer of each block: its number, or its position where several numbers vary."""
        index = {
            name: [int(part) for part in name.partition(" ")[0].split(".") if part.isdigit()]
            for name in self.names
        }
        varying = [k for k, column in enumerate(zip(*index.values())) if len(set(column)) > 1]
        if len(varying) <= 1:
            column = varying[0] if varying else 0
            return {name: numbers[column] if numbers else 0 for name, numbers in index.items()}
        return {name: k for k, name in enumerate(sorted(self.names, key=lambda name: index[name]))}


def _number(found: dict[str, list[Site]], prefix: str) -> list[Site]:
    """Give every site its stack and its layer."""
    stacks: dict[str, Stack] = defaultdict(Stack)
    for name in found:
        pattern = re.sub(r"(?<![^.])\d+(?![^. ])", "*", name.removeprefix(prefix))
        stacks[pattern].names.append(name)
    numbered: list[Site] = []
    for pattern, short in _stack_names(list(stacks)).items():
        layers = stacks[pattern].layers()
        members = [
            replace(site, stack=short, layer=layers[name])
            for name in stacks[pattern].names
            for site in found[name]
        ]
        numbered += sorted(members, key=lambda site: (site.layer, ROLES.index(site.role)))
    return numbered


def _stack_names(patterns: list[str]) -> dict[str, str]:
    """Short names: a path without numbers and, where that stays unique, the usual containers."""

    def words(pattern: str, drop: frozenset[str]) -> str:
        kept = [word for word in re.split(r"[. ]", pattern) if word not in ("*", "", *drop)]
        return ".".join(kept) or "layers"

    candidates = [
        [words(pattern, drop) for pattern in patterns] for drop in (_CONTAINERS, frozenset[str]())
    ]
    candidates.append(patterns)
    return {
        pattern: next(names[k] for names in candidates if names.count(names[k]) == 1)
        for k, pattern in enumerate(patterns)
    }
