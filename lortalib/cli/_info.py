"""Defines the command ``info``, which describes an adapter."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict

import torch

from .. import nn as lnn
from ._output import Output


def info(options: Namespace, output: Output) -> bool:
    """Describe an adapter: ``info FOLDER``."""
    adapter = lnn.read(options.folder, revision=options.revision)
    description = lnn.read_description(options.folder, revision=options.revision)
    networks = [
        {
            "tensor": group.name,
            "shape": str(adapter.network(group).shape).removeprefix("Shape"),
            "legs": str(adapter.network(group).legs),
            "ranks": " ".join(f"{b}={n}" for b, n in adapter.network(group).ranks.items()),
            "trainable parameters": adapter.network(group).count(),
        }
        for group in adapter.groups
    ]
    norms: dict[tuple[str, str], list[float]] = defaultdict(list)
    sites = []
    for site in output.progress(adapter.sites, "norms"):
        by_head = adapter.norms(site).reshape(-1, site.heads).norm(dim=0)  # joins the experts
        heads, total = by_head.tolist(), float(by_head.norm())
        norms["layer", f"{site.stack} {site.layer}"].append(total)
        norms["matrix", f"{site.stack} {site.role}"].append(total)
        for number, norm in enumerate(heads):
            norms["head", f"{site.stack} {number}"].append(norm)
        sites.append(
            {
                "stack": site.stack,
                "layer": site.layer,
                "matrix": site.role,
                "path": site.path,
                "norm": total,
                "norm by head": heads,
            }
        )
    base = description["base_model"]
    about = {
        "adapter": adapter.name,
        "decomposition": adapter.config.decomposition,
        "trainable parameters": adapter.count(),
        "scaling": adapter.scaling,
        "trained on": " ".join(filter(None, [base.get("class"), base.get("name")])),
        "trained as a whole": ", ".join(description["trained_modules"]) or None,
        "written by": f"lortalib {description.get('lortalib_version')}",
    }
    output.show(
        {**about, "tensors": networks, "sites": sites},
        [about],
        networks,
        *(_norm_table(norms, kind) for kind in ("matrix", "layer", "head")),
    )
    return True


def _norm_table(
    norms: dict[tuple[str, str], list[float]], kind: str
) -> list[dict[str, str | float]]:
    """Combine the norms of all sites into one norm for each layer, matrix or head."""
    found = {name: torch.tensor(v).norm().item() for (k, name), v in norms.items() if k == kind}
    most = max(found.values(), default=0.0) or 1.0
    return [
        {kind: name, "norm of the update": norm, "": "#" * round(24 * norm / most)}
        for name, norm in found.items()
    ]
