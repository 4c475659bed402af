"""Names the stacks of a model, numbers their layers, and joins sites that share one weight."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace

from torch import nn

from ..._columns import aligned
from .site import ROLES, FeatureRows, Site
from .weights import original_weight


class SiteList(list[Site]):
    """A list of sites that prints as a table, one row for each stack and shape."""

    def rows(self) -> list[dict[str, str | int]]:
        """Make the rows of the table: one record for each stack, role and shape."""
        alike: dict[tuple[object, ...], list[Site]] = defaultdict(list)
        for site in self:
            key = (site.stack, site.role, site.heads, site.head_dim, site.width, str(site.rows))
            alike[key].append(site)
        return [
            {
                "stack": site.stack,
                "layers": len(members),
                "role": site.role + (" (weight)" if site.weight_read_directly else ""),
                "heads": site.heads,
                "head_dim": site.head_dim,
                "width": site.width,
                "first module": site.path,
                "rows": str(site.rows) if site.rows else "all",
            }
            for members in alike.values()
            for site in members[:1]
        ]

    def __str__(self) -> str:
        head = ("stack", "layers", "role", "heads", "head_dim", "width", "first module", "rows")
        rows: list[tuple[str, ...]] = [head]
        for row in self.rows():
            cells = (f"{cell:,}" if isinstance(cell, int) else cell for cell in row.values())
            rows.append(tuple(cells))
        return "\n".join(aligned(rows))


def bare_prefix(model: nn.Module) -> str:
    """Return the path of the bare model inside one with a head, so that both have the same stack names."""
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


def join_tied(found: dict[str, list[Site]], modules: dict[str, nn.Module]) -> dict[str, list[Site]]:
    """Join modules that hold the same parameter to one site, so that tied weights stay tied."""
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
    """A stack: blocks whose paths differ in numbers only."""

    names: list[str] = field(default_factory=list)

    def layers(self) -> dict[str, int]:
        """Number each block: the number in its path, or its position if several numbers vary."""
        index = {
            name: [int(part) for part in name.partition(" ")[0].split(".") if part.isdigit()]
            for name in self.names
        }
        varying = [k for k, column in enumerate(zip(*index.values())) if len(set(column)) > 1]
        if len(varying) <= 1:
            column = varying[0] if varying else 0
            return {name: numbers[column] if numbers else 0 for name, numbers in index.items()}
        return {name: k for k, name in enumerate(sorted(self.names, key=lambda name: index[name]))}


def number_layers(found: dict[str, list[Site]], prefix: str) -> list[Site]:
    """Set the stack and the layer of every site."""
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
    """Make short names: paths without numbers and, if that stays unique, without the usual containers."""

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
