"""Defines the command that compresses saved LoRAs and adapters."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import nn

from .. import nn as lnn
from ..nn import AdapterFileError
from ..nn.door import HubPlace, each_place, lora_config
from ._models import base_of, load, named_model, shape_of
from ._output import Output
from ._place import places


def compress(options: Namespace, output: Output) -> bool:
    """Fit one tensor to LoRAs and adapters of one model: ``compress LORA... OUT``."""
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):  # before minutes of fitting
        raise FileExistsError(f"{out} exists and is not empty; give another folder")
    where = places(options)
    bases = [
        _base_of(folder, own)
        for folder, own in zip(options.lora, each_place(len(options.lora), **where))
    ]
    name = named_model(options.model, bases[0][0], "the first adapter")
    on_stream = any(acts_on_stream for _, acts_on_stream in bases)
    model: nn.Module = (
        load(base_of(options, name), "float32", whole=True)
        if on_stream
        else shape_of(base_of(options, name))
    )
    with output.counter(options.sweeps, "sweeps") as step:
        found = lnn.compress(
            model,
            options.lora,
            options.to,
            options.rank,
            **where,
            joint=options.joint,
            gqa=options.gqa,
            sweeps=options.sweeps,
            progress=lambda group, number, error: step(f"{group} {error:.4f}"),
        )
    found.save(out)
    about = {
        "adapters": len(found.names),
        "decomposition": options.to,
        "parameters": found.count(),
        "parameters before": found.original_count(),
        "relative error": found.error,
        "written": str(out),
    }
    tensors = [
        {"tensor": name, "legs": str(net.legs), "error": found.fits[name].error}
        for name, net in found.networks.items()
    ]
    kinds = ("adapter", "matrix", "layer", "head")
    tables = {kind: found.table(kind) for kind in kinds}
    output.show(
        {**about, "tensors": tensors, "errors": tables, "sites": _sites(found)},
        [about],
        tensors,
        *(tables[kind] for kind in kinds[len(found.names) == 1 :]),
    )
    return True


def _sites(found: lnn.Compression) -> list[dict[str, Any]]:
    return [
        {
            "adapter": each.adapter,
            "stack": each.site.stack,
            "layer": each.site.layer,
            "matrix": each.site.role,
            "path": each.site.path,
            "norm by head": each.norms,
            "error by head": each.errors,
        }
        for each in found.errors
    ]


def _base_of(folder: str, where: HubPlace) -> tuple[str | None, bool]:
    """Return the name of the model that an adapter was trained on, and whether it acts on the stream."""
    try:
        description = lnn.read_description(folder, **where)
    except (AdapterFileError, FileNotFoundError):
        return lora_config(folder, **where).get("base_model_name_or_path"), False
    return description["base_model"].get("name"), description["config"]["acts_on"] == "stream"
