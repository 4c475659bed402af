"""Defines the command ``info``, which describes an adapter."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable

import torch

from .. import nn as lnn
from ..decomp import TensorNetwork
from ._output import Output
from ._place import place


def info(options: Namespace, output: Output) -> bool:
    """Describe an adapter: ``info FOLDER``."""
    adapter = lnn.read(options.folder, **place(options))
    description = lnn.read_description(options.folder, **place(options))
    tasks: tuple[str, ...] = ()
    updates = [adapter]
    network_of: Callable[[lnn.Group], TensorNetwork] = adapter.network
    if isinstance(adapter, lnn.TaskAdapter):
        tasks, network_of = adapter.tasks, adapter.tensor
        updates = [adapter.task(name) for name in tasks]
    networks = [
        {
            "tensor": group.name,
            "shape": str(network.shape).removeprefix("Shape"),
            "legs": str(network.legs),
            "ranks": " ".join(f"{b}={n}" for b, n in network.ranks.items()),
            "trainable parameters": network.count(),
        }
        for group in adapter.groups
        for network in [network_of(group)]
    ]
    norms: dict[tuple[str, str], list[float]] = defaultdict(list)
    sites = []
    for update, site in output.progress([(u, s) for u in updates for s in u.sites], "norms"):
        by_head = update.norms(site).reshape(-1, site.heads).norm(dim=0)  # joins the experts
        heads, total = by_head.tolist(), float(by_head.norm())
        if tasks:
            norms["task", update.name].append(total)
        norms["layer", f"{site.stack} {site.layer}"].append(total)
        norms["matrix", f"{site.stack} {site.role}"].append(total)
        for number, norm in enumerate(heads):
            norms["head", f"{site.stack} {number}"].append(norm)
        sites.append(
            {
                **({"task": update.name} if tasks else {}),
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
        **({"tasks": ", ".join(tasks)} if tasks else {}),
        "trained on": " ".join(filter(None, [base.get("class"), base.get("name")])),
        "trained as a whole": ", ".join(description["trained_modules"]) or None,
        "written by": f"lortalib {description.get('lortalib_version')}",
    }
    output.show(
        {**about, "tensors": networks, "sites": sites},
        [about],
        networks,
        *(_norm_table(norms, kind) for kind in ("task", "matrix", "layer", "head")),
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
