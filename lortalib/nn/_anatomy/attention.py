"""Finds the attention blocks of a model, and the modules that look like one but were not understood."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from .block import AttentionBlock
from .names import is_attention, is_mixer, projection_children, role_of
from .rules import BlockRule
from .site import Site
from .weights import is_projection
from .wrappers import module_at


def find_blocks(
    modules: dict[str, nn.Module], rules: Sequence[BlockRule]
) -> Iterator[AttentionBlock]:
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
        words_of: dict[str, tuple[str, ...]] = defaultdict(tuple)
        for name, below in projection_children(module):
            full = first[id(module_at(module, below))]  # a module can have two paths
            role, extra = role_of(name) or ("", ())
            if full in declared:
                continue
            latent = extra[:1] if role in ("q", "kv") and extra[:1] in (("a",), ("b",)) else ()
            if latent:
                role, extra = f"{role}_{extra[0]}", ()
            sets[() if role == "o" else extra][role].append(full)
            words_of[full] = extra
        outputs = {full: words_of[full] for full in sets[()].get("o", [])}
        if "q" in sets[()] and "qkv" in sets[()]:  # GPT-2's cross attention: c_attn is k and v
            sets[()]["kv"] = sets[()].pop("qkv")
        taken: set[str] = set()
        for extra, roles in sets.items():
            held = {role: paths[0] for role, paths in roles.items() if role and role != "o"}
            if not _is_block(set(held), module, bool(extra)):
                continue
            output = _output(path, extra, outputs, modules)
            shares_output = output in taken  # a second set of q, k, v with the first's o
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
    path: str,
    extra: tuple[str, ...],
    candidates: Mapping[str, tuple[str, ...]],
    modules: dict[str, nn.Module],
) -> str | None:
    """Find the output projection: in the block itself, else ``../output.dense`` as in BERT.

    Of several in the block, those with the extra words of the set come first: ``to_add_out`` for
    ``add_q_proj``, ``add_k_proj`` and ``add_v_proj``.
    """

    def preference(candidate: str) -> tuple[bool, bool]:
        name = candidate.removeprefix(path)
        return "o_proj" not in name and "out_proj" not in name, "out" not in name

    if candidates:
        alike = [each for each, words in candidates.items() if words == extra]
        return min(alike or candidates, key=preference)
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


def overlooked_blocks(
    modules: dict[str, nn.Module],
    found: dict[str, list[Site]],
    refused: dict[str, str],
    rules: Sequence[BlockRule],
) -> dict[str, str]:
    """Find modules with weights whose class is named attention, but which are part of no block."""
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


def claimed_twice(found: dict[str, list[Site]]) -> dict[str, str]:
    """Find blocks that use one whole projection for two roles: two updates would not fit its output."""
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
