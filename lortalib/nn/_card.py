"""Writes the page of an adapter that a repository of the hub shows: its model card."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from ._adapter import Adapter
from ._hub import is_repository
from ._table import lora_count


def model_card(
    adapters: Mapping[str, Adapter],
    place: str = "FOLDER",
    *,
    base_model: str | None = None,
    data: str | None = None,
    scores: Mapping[str, float | str] | None = None,
    lora: str | None = None,
    with_base: bool = False,
) -> str:
    """Write the model card of the adapters of one model, in Markdown.

    Args:
        adapters: the adapters by the name of their file.
        place: the repository, or a word that stands for the folder of the file.
        base_model: the name of the model they were trained on; by default the model's own.
        data: the training data, in words.
        scores: what was measured, by name.
        lora: the folder beside them with the same adapter as a LoRA of PEFT, if there is one.
        with_base: whether the weights of the model are beside them, because they changed too.

    Returns:
        The text, headed by the metadata that the hub reads.
    """
    first = next(iter(adapters.values()))
    base = base_model or getattr(getattr(first.model, "config", None), "_name_or_path", None) or ""
    kind, library = type(first.model).__name__, type(first.model).__module__.partition(".")[0]
    loaded = place if with_base else base or "MODEL"
    parts = [
        _metadata(adapters.values(), base),
        "# A fine-tuning as a tensor network\n",
        _WHOLE.format(kind=kind)
        if with_base
        else f"The weights of `{base or kind}` are not here, only what was trained on them.\n",
        *(_table(file, adapter, base, data) for file, adapter in adapters.items()),
    ]
    if scores:
        rows = "".join(f"| {_cell(name)} | {_cell(score)} |\n" for name, score in scores.items())
        parts.append(f"## Scores\n\n| measured | score |\n|---|---|\n{rows}")
    parts += [
        _WITH.format(library=library, kind=kind, base=loaded, place=place),
        _without(first, loaded, place, lora),
    ]
    return "\n".join(parts)


_WHOLE = """\
The weights of the model are here too, because they changed. `{kind}.from_pretrained` alone loads them without
what is in the tensor network; `lortalib.nn.load` adds it.
"""

_WITH = """\
## With lortalib

    import lortalib
    from {library} import {kind}

    model = {kind}.from_pretrained("{base}")
    lortalib.nn.load(model, "{place}")

`lortalib merge {base} {place} OUT` writes an ordinary model with the adapter in its weights.
"""


def _without(adapter: Adapter, base: str, place: str, lora: str | None) -> str:
    """Say how the adapter is used where lortalib is not installed."""
    if lora is not None:
        return (
            f"## Without lortalib\n\n`{lora}` holds the same updates as an ordinary LoRA, which PEFT and "
            "vLLM read:\n\n    from peft import PeftModel\n\n"
            f'    PeftModel.from_pretrained(model, "{place}", subfolder="{lora}")\n'
        )
    needed = f" --model {base}" if adapter.config.acts_on == "stream" else ""
    return (
        f"## Without lortalib\n\n`lortalib export-lora {place} OUT{needed}` writes an ordinary LoRA with the "
        "same updates once; PEFT, vLLM and llama.cpp then read it without lortalib.\n"
    )


def _metadata(adapters: Iterable[Adapter], base: str) -> str:
    """Return the block of metadata. A base that is a local folder is left out: the hub does not know it."""
    from huggingface_hub import ModelCardData  # deferred, as in _hub

    formats = sorted({each.config.decomposition for each in adapters})
    known = is_repository(base) and not os.path.exists(base)
    about = ModelCardData(
        base_model=base if known else None,
        library_name="lortalib",
        tags=["lortalib", "adapter", *(name for name in formats if name.isidentifier())],
    )
    return f"---\n{about.to_yaml()}\n---\n"


def _table(file: str, adapter: Adapter, base: str, data: str | None) -> str:
    """Describe one adapter in a table."""
    networks = [adapter.tensor(group) for group in adapter.groups]
    ranks = {**networks[0].ranks, **networks[0].vectors}
    rank = max((n for net in networks for n in net.ranks.values()), default=1)
    stream = adapter.config.acts_on == "stream"
    rows = {
        "base": " ".join(filter(None, [f"`{base}`" if base else "", type(adapter.model).__name__])),
        "format": f"`{adapter.config.decomposition}`",
        "line": " ; ".join(dict.fromkeys(f"`{net.legs}`" for net in networks)),
        "rank": ", ".join(f"{bond} = {size:,}" for bond, size in ranks.items()),
        "acts on": "the residual stream" if stream else "the weights",
        "scaling": f"{adapter.config.scaling:g}",
        "projections": f"{len(adapter.sites):,}",
        "trainable parameters": f"{adapter.count():,}; a LoRA of rank {rank:,} on the same projections has "
        f"{lora_count(adapter.groups, rank):,}",
        "trained as a whole": ", ".join(adapter.trained_modules.paths),
        "data": data,
    }
    lines = "".join(f"| {name} | {_cell(value)} |\n" for name, value in rows.items() if value)
    return f"| `{file}` | |\n|---|---|\n{lines}"


def _cell(value: object) -> str:
    """Write a value so that it stays in its cell."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
