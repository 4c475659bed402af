"""The results of a run as a page: goals first, then a table for every cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cases import CP8, FLOOR, LORA
from plan import BANK

Result = dict[str, Any]


def page(about: Mapping[str, str], results: Sequence[Result]) -> str:
    """All of it.

    Args:
        about: the machine and the versions.
        results: of every cell, those that were not run too.
    """
    lines = ["# On a GPU", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += [
        "Times of one run in milliseconds, medians over the rounds, with the ratio to the frozen base in "
        "the same round. Above the floor: the part of LoRA's additional time that a contender needs. MiB: "
        "the most that a contender had in memory beside the base's weights. transformers reads one number "
        "back in every eager forward without a mask, of the base and of all contenders.",
        "",
        *_goals(results),
    ]
    missing = [result for result in results if "not run" in result]
    for result in results:
        lines += _section(result) if result not in missing else []
    if missing:
        lines += ["## Not run", ""]
        lines += [f"* {_name(result)}: {result['not run']}" for result in missing] + [""]
    return "\n".join(lines)


def _goals(results: Sequence[Result]) -> list[str]:
    rows = [
        f"| {_name(result)} | {goal} | {found} |"
        for result in results
        if "ratio" in result
        for goal, found in _goals_of(result)
    ]
    return ["## Goals", "", "| cell | goal | found |", "|---|---|---:|", *rows, ""] if rows else []


def _goals_of(result: Result) -> Iterator[tuple[str, str]]:
    ratios = result["ratio"]
    part = _above_floor(ratios, CP8)
    if result["work"] == "training step" and part is not None:
        yield "CP r8 above the floor at most half of LoRA's", f"{part:.2f}"
    if result["work"] == "decoding" and CP8 in ratios:
        yield "CP r8 within 3 % of the base", f"{100 * (ratios[CP8] - 1):+.1f} %"
    if result["work"] == BANK:
        bank, mixed = (
            next((ratios[name] for name in ratios if name.startswith(kind)), None)
            for kind in ("lortalib", "PEFT")
        )
        if bank and mixed:
            yield "bank at least 10 times as fast as PEFT's mixed batch", f"{mixed / bank:.1f}"


def _above_floor(ratios: Mapping[str, float], name: str) -> float | None:
    """The part of LoRA's time above the floor that a contender needs."""
    lora = ratios.get(LORA, 1.0) - 1
    return (ratios[name] - 1) / lora if lora > 0 and name in ratios else None


def _name(result: Result) -> str:
    name = result["work"]
    if "mode" in result:
        name = f"{result['model']}, {name}, {result['mode']}"
    if "rows" in result:
        name += f", {result['rows']} x {result['tokens']}"
    return str(name)


def _section(result: Result) -> list[str]:
    lines = [f"## {_name(result)}", ""]
    if "end" in result:
        lines += [f"Exit code {result['exit code']}.", "", "```", *result["end"], "```", ""]
    if "ms" in result:
        lines += ["| contender | ms | ratio | above the floor, of LoRA's | MiB |"]
        lines += ["|---|---:|---:|---:|---:|"]
        for name, value in result["ms"].items():
            part = None if name == FLOOR else _above_floor(result["ratio"], name)
            lines.append(
                f"| {name} | {value:.3f} | {result['ratio'][name]:.3f} | "
                f"{'' if part is None else f'{part:.2f}'} | {result['MiB'].get(name, '')} |"
            )
        lines.append("")
    lines += [f"* {name} failed: {error}" for name, error in result.get("failed", {}).items()]
    return [*lines, ""] if result.get("failed") else lines
