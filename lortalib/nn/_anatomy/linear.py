"""Makes sites of linear maps whose role no rule knows: each is one matrix with one head."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from .site import Site
from .stacks import Stack
from .weights import is_conv1d


def linear_sites(
    modules: Mapping[str, nn.Module], sizes: Mapping[str, tuple[int, int]]
) -> list[Site]:
    """Make a site for each of these modules, whatever its name.

    Modules whose paths differ in one number are the layers of one stack; the rest of the path after the
    number is the role. All are readers: ``in`` is their input, ``out`` their output, with one head.

    Args:
        modules: modules by path.
        sizes: for each path, the features that the module reads and writes.

    Example:
        >>> modules = {f"blocks.{k}.fc": nn.Linear(3, 4) for k in range(2)}
        >>> [(s.stack, s.layer, s.role) for s in linear_sites(modules, dict.fromkeys(modules, (3, 4)))]
        [('linear.blocks', 0, 'fc'), ('linear.blocks', 1, 'fc')]
    """
    stacks: dict[str, Stack] = defaultdict(Stack)
    for path in modules:
        stacks[re.sub(r"(?<![^.])\d+(?![^.])", "*", path)].names.append(path)
    sites = []
    for pattern, stack in stacks.items():
        before, _, role = pattern.rpartition("*" if "*" in pattern else ".")
        name = f"linear.{before.replace('*', '0')}".rstrip(".")  # unique: no pattern holds a number
        for path, layer in stack.layers().items():
            width, features = sizes[path]
            sites.append(
                Site(
                    stack=name,
                    layer=layer,
                    role=role.strip(".").replace(".", "_") or "linear",
                    path=path,
                    heads=1,
                    query_heads=1,
                    head_dim=features,
                    width=width,
                    writer=False,
                    transposed=is_conv1d(modules[path]),
                )
            )
    return sites
