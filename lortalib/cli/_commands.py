"""Defines the commands; each prints its findings and returns False if a check failed."""

from __future__ import annotations

import os
import tempfile
import warnings
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import nn as lnn
from ..decomp import LegsError
from ..nn import AdapterFileError
from ..nn.door import choose_sites, find_candidates, lora_config
from ._models import load, shape_of
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


def plan(options: Namespace, output: Output) -> bool:
    """Count the trainable parameters of formats: ``plan MODEL``."""
    model = shape_of(options.model, options.trust_remote_code)
    total = sum(p.numel() for p in model.parameters())
    chosen = choose_sites(find_candidates(model, options.targets, ()), options.targets, None)
    rows: list[dict[str, Any]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for name in options.decomposition:
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
            except LegsError as error:  # a format that cannot carry a mode does not stop the others
                reason = str(error).partition("\n")[0].removesuffix(", in")
                rows.append(_row(name, None, (None,) * len(_COUNTS), reason))
                break
            shapes = {group.name: tuple(group.shape.values()) for group in planned.groups}
            count, lora = planned.count(), planned.lora_count(rank)
            rows.append(
                _row(name, rank, (count, 100 * count / total, lora / count, count * 4 / 1024))
            )
    about = {
        "model": options.model,
        "class": type(model).__name__,
        "parameters": total,
        "projections": len(chosen),
        "tensors": "; ".join(f"{name} {shape}" for name, shape in shapes.items()) or None,
    }
    refused = any(row["why not"] for row in rows)
    table = [{k: v for k, v in row.items() if refused or k != "why not"} for row in rows]
    output.show({**about, "plans": rows}, [about], table)
    return bool(shapes)


_COUNTS = (
    "trainable parameters",
    "% of the model",
    "LoRA of this rank / it",
    "KiB in float32",
)


def _row(
    name: str, rank: int | None, counts: Sequence[float | None], reason: str | None = None
) -> dict[str, Any]:
    """Describe one format of one rank; an impossible format has a reason instead of counts."""
    return {
        "decomposition": name,
        "rank": rank,
        **dict(zip(_COUNTS, counts)),
        "why not": reason,
    }


def sites(options: Namespace, output: Output) -> bool:
    """List the projections that an adapter would update in a model: ``sites MODEL``."""
    model = shape_of(options.model, options.trust_remote_code)
    chosen = choose_sites(find_candidates(model, options.targets, ()), options.targets, None)
    rows = [
        {
            "stack": site.stack,
            "layer": site.layer,
            "role": site.role,
            "module": site.path,
            "heads": site.heads,
            "head_dim": site.head_dim,
            "width": site.width,
            "why": reason(site),
        }
        for site in chosen
    ]
    output.show({"model": options.model, "class": type(model).__name__, "sites": rows}, rows)
    return True


def reason(site: lnn.Site) -> str:
    """Explain in words how a site is read."""
    side = "writes the residual stream" if site.writer else "reads the residual stream"
    words = [f"{site.heads} heads of {site.head_dim}, {side} of width {site.width}"]
    if site.heads != site.query_heads:
        words.append(f"{site.query_heads // site.heads} query heads share one of its heads")
    if site.rows is not None:
        words.append(f"rows {site.rows} of a fused projection of {site.fused}")
    if site.transposed:
        words.append("weight stored (in, out)")
    if site.experts:
        words.append(f"{site.experts} experts in one parameter")
    if site.weight_read_directly:
        words.append("its weight is read directly, so the update is added when it is read")
    if site.tied_paths:
        words.append(f"tied to {', '.join(site.tied_paths)}")
    return "; ".join(words)


def check(options: Namespace, output: Output) -> bool:
    """Check that an adapter is sound, and fits a model: ``check FOLDER``."""
    if options.trust_remote_code and not options.model:
        raise ValueError(
            "--trust-remote-code goes with --model only: the file of an adapter names no code to run"
        )
    folder, revision = options.folder, options.revision
    findings: dict[str, Any] = {"adapter": folder, "sound": False, "fits": None, "why": None}
    try:
        adapter = lnn.read(folder, revision=revision)
        named = lnn.read_description(folder, revision=revision)["base_model"].get("name")
        findings["sound"] = True
    except (AdapterFileError, FileNotFoundError) as error:
        findings["why"] = str(error)
        output.show(findings, [findings])
        return False
    findings["trainable parameters"] = adapter.count()
    name = options.model or named
    if options.model or (named and _is_folder(named)):
        findings["model"] = name
        try:
            lnn.load(shape_of(name, options.trust_remote_code), folder, revision=revision)
            findings["fits"] = True
        except (OSError, ValueError, ImportError) as error:
            # Without --model, a failure to load says nothing against the adapter.
            findings["fits"] = False if options.model else None
            findings["why"] = str(error).strip().partition("\n\n")[0]
    elif named:
        findings["why"] = f"the model {named!r} was not looked up; give it as --model to do so"
    else:
        findings["why"] = "the file names no model; give one as --model"
    output.show(findings, [findings])
    return findings["fits"] is not False


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # the system allows no folder of this name
        return False


def merge(options: Namespace, output: Output) -> bool:
    """Write a model with an adapter merged into its weights: ``merge MODEL FOLDER OUT``."""
    out = Path(options.out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not empty; give another folder")
    lnn.read_description(
        options.folder, revision=options.revision
    )  # fails before a large model is read
    model = load(options.model, options.dtype, options.trust_remote_code)
    output.say(f"read {type(model).__name__} from {options.model}")
    adapter = lnn.load(model, options.folder, revision=options.revision)
    adapter.remove(merged=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".merging-") as aside:
        whole = Path(aside, "model")  # renamed in one step, so OUT is never half a model
        model.save_pretrained(whole)
        without = _copy_tokenizer(options.model, whole, options.trust_remote_code)
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


def _copy_tokenizer(name: str, out: Path, trust_remote_code: bool) -> str | None:
    """Copy the tokenizer of a model; return the reason if this fails, else None."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        tokenizer.save_pretrained(out)
    except (
        Exception
    ) as error:  # some models have no tokenizer; the merged model is kept all the same
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def export_lora(options: Namespace, output: Output) -> bool:
    """Write an adapter as a LoRA of PEFT or llama.cpp: ``export-lora FOLDER OUT``."""
    base = lnn.read_description(options.folder, revision=options.revision)["base_model"].get("name")
    if options.model is None:
        adapter = lnn.read(options.folder, revision=options.revision)
        if adapter.config.acts_on == "stream":
            raise ValueError(
                f"the adapter in {options.folder} acts on the residual stream, so a LoRA of it is a product "
                "with the weights of its model: give --model"
            )
    else:
        model = load(options.model, "float32", options.trust_remote_code)
        adapter = lnn.load(model, options.folder, revision=options.revision)
    if options.format == "gguf":
        file = lnn.export_gguf(adapter, options.out)
        findings = {"adapter": options.folder, "written": str(file), "bytes": file.stat().st_size}
        output.show(findings, [findings])
        return True
    folder = lnn.export_lora(adapter, options.out, base_model=options.model or base)
    findings = {
        "adapter": options.folder,
        "written": str(folder),
        "rank": lora_config(folder)["r"],
        "modules": len({path for site in adapter.sites for path in (site.path, *site.tied_paths)}),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }
    output.show(findings, [findings])
    return True


def convert(options: Namespace, output: Output) -> bool:
    """Convert an adapter's folder between the kinds of lortalib and PEFT: ``convert FOLDER OUT``."""
    folder = lnn.convert(options.folder, options.out, revision=options.revision)
    files = sorted(file.name for file in folder.iterdir())
    findings = {"adapter": options.folder, "written": str(folder), "files": ", ".join(files)}
    output.show(findings, [findings])
    return True
