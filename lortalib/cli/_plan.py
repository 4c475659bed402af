"""Defines the command ``plan``, which counts trainable parameters."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .. import nn as lnn
from ..decomp import LegsError
from ..nn.door import choose_sites, find_candidates
from ._models import base_of, shape_of
from ._output import Output

#: The formats that are listed for several ranks, unless others are named.
FORMATS = ("indscal", "cp", "tucker", "tt", "lotr", "lora")


def plan(options: Namespace, output: Output) -> bool:
    """Count the trainable parameters of formats: ``plan MODEL``."""
    model = shape_of(base_of(options, options.model))
    total = sum(p.numel() for p in model.parameters())
    chosen = choose_sites(find_candidates(model, options.targets, ()), options.targets, None)
    about = {
        "model": options.model,
        "class": type(model).__name__,
        "parameters": total,
        "projections": len(chosen),
    }
    found = _within(model, options) if options.numbers else _of_ranks(model, options)
    rows = [
        {
            "decomposition": name,
            "rank": rank,
            "trainable parameters": count,
            "% of the model": count and 100 * count / total,
            "LoRA of this rank / it": lora and count and lora / count,
            "KiB in float32": count and count * 4 / 1024,
            "why not": reason,
        }
        for name, rank, count, lora, reason in found
    ]
    output.show({**about, "plans": rows}, [about], _without_empty_columns(rows))
    return any(row["why not"] is None for row in rows)


#: Name, rank, trainable parameters, those of a LoRA, and the reason if there are none.
_Found = tuple[str, Any, "int | None", "int | None", "str | None"]


def _of_ranks(model: nn.Module, options: Namespace) -> Iterator[_Found]:
    """Count the parameters of each format at each rank."""
    for name in options.decomposition or FORMATS:
        for rank in options.rank:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # ranks that short modes cannot fill are cut
                    planned = lnn.plan(
                        model,
                        name,
                        rank,
                        targets=options.targets,
                        acts_on=options.acts_on,
                        device="meta",
                    )
            except LegsError as error:  # a format that is impossible here does not stop the others
                reason = str(error).partition("\n")[0].removesuffix(", in")
                yield name, None, None, None, reason
                break
            yield name, rank, planned.count(), planned.lora_count(rank), None


def _within(model: nn.Module, options: Namespace) -> Iterator[_Found]:
    """Find the ranks of each format that come closest to a budget from below."""
    table = lnn.plan(
        model,
        options.decomposition,
        numbers=options.numbers,
        targets=options.targets,
        acts_on=options.acts_on,
    )
    for row in table:
        rank = row.rank
        named = rank.items() if isinstance(rank, Mapping) else ()
        text = " ".join(f"{bond}={size}" for bond, size in named) or rank
        yield row.format, text, row.parameters, None, None
    for name, reason in table.refused.items():
        yield name, None, None, None, reason


def _without_empty_columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    full = [key for key in rows[0] if any(row[key] is not None for row in rows)] if rows else []
    return [{key: row[key] for key in full} for row in rows]
