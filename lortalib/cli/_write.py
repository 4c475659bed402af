"""Defines the commands that write something: ``merge``, ``export-lora`` and ``convert``."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from .. import nn as lnn
from ..nn.door import lora_config
from ._models import Base, base_of, load, named_model, tokenizer_of
from ._output import Output
from ._place import place
from ._task import check_task


def merge(options: Namespace, output: Output) -> bool:
    """Write a model with an adapter merged into its weights: ``merge MODEL FOLDER OUT``."""
    out = Path(options.out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not empty; give another folder")
    # Both fail before a large model is read.
    description = lnn.read_description(options.folder, **place(options))
    check_task(options.folder, description["tasks"], options.task)
    base = base_of(options, options.model)
    model = load(base, options.dtype, whole=True)
    output.say(f"read {type(model).__name__} from {options.model}")
    adapter = lnn.load(model, options.folder, **place(options), task=options.task)
    adapter.remove(merged=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".merging-") as aside:
        whole = Path(aside, "model")  # renamed in one step, so OUT is never half a model
        model.save_pretrained(whole)
        without = _copy_tokenizer(base, whole)
        os.replace(whole, out)
    findings: dict[str, Any] = {
        "model": options.model,
        "adapter": options.folder,
        "written": str(out),
        "projections changed": len(adapter.sites),
        "tokenizer copied": without is None,
    }
    if without is not None:
        findings["why no tokenizer"] = without
    output.show(findings, [findings])
    return True


def _copy_tokenizer(base: Base, out: Path) -> str | None:
    """Copy the tokenizer of a model; return the reason if this fails, else None."""
    try:
        tokenizer_of(base).save_pretrained(out)
    except Exception as error:  # some models have none; the merged model is kept all the same
        return str(error)
    return None


def export_lora(options: Namespace, output: Output) -> bool:
    """Write an adapter as a LoRA of PEFT or llama.cpp: ``export-lora FOLDER OUT``."""
    description = lnn.read_description(options.folder, **place(options))
    check_task(options.folder, description["tasks"], options.task)
    if options.model is None:
        adapter = lnn.read(options.folder, **place(options), task=options.task)
        if adapter.config.acts_on == "stream":
            raise ValueError(
                f"the adapter in {options.folder} acts on the residual stream, so a LoRA of it is a product "
                "with the weights of its model: give --model"
            )
    else:
        model = load(base_of(options, options.model), "float32", whole=True)
        adapter = lnn.load(model, options.folder, **place(options), task=options.task)
    if options.format == "gguf":
        file = lnn.export_gguf(adapter, options.out)
        findings = {"adapter": options.folder, "written": str(file), "bytes": file.stat().st_size}
        output.show(findings, [findings])
        return True
    base = options.model or description["base_model"].get("name")
    folder = lnn.export_lora(adapter, options.out, base_model=base)
    findings = {
        "adapter": options.folder,
        "written": str(folder),
        "rank": lora_config(folder)["r"],
        "modules": len({path for site in adapter.sites for path in (site.path, *site.tied_paths)}),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }
    output.show(findings, [findings])
    return True


def from_lora(options: Namespace, output: Output) -> bool:
    """Write a LoRA of PEFT as an adapter of lortalib, exactly: ``from-lora FOLDER OUT``."""
    named = lora_config(options.folder, **place(options)).get("base_model_name_or_path")
    name = named_model(options.model, named, "the LoRA")
    model = load(base_of(options, name), "float32")
    adapter = lnn.load_lora(model, options.folder, **place(options))
    written = adapter.save(options.out)
    findings = {
        "LoRA": options.folder,
        "written": str(written),
        "decomposition": adapter.config.decomposition,
        "parameters": adapter.count(trainable_only=False),
    }
    output.show(findings, [findings])
    return True


def convert(options: Namespace, output: Output) -> bool:
    """Convert an adapter's folder between the kinds of lortalib and PEFT: ``convert FOLDER OUT``."""
    description = lnn.read_description(options.folder, **place(options))
    check_task(options.folder, description["tasks"], options.task)
    folder = lnn.convert(options.folder, options.out, **place(options), task=options.task)
    files = sorted(file.name for file in folder.iterdir())
    findings = {"adapter": options.folder, "written": str(folder), "files": ", ".join(files)}
    output.show(findings, [findings])
    return True
