"""How long does a training step take with an adapter, relative to the frozen base and to PEFT?

A step is: gradients dropped, forward, loss, backward; the optimiser's own step is left out. Between
steps all that trains is changed a little, untimed. Every contender adapts q, k, v, o of every layer;
`subjects` says what the contenders and the floor are. For each model, number of tokens (rows of 64,
128 or 256) and rank:

* time / floor: the whole step relative to the floor's.
* time / LoRA: the whole step relative to that of PEFT LoRA of the same rank.
* overhead / LoRA: the time above the floor relative to PEFT LoRA's time above it.

All three are formed from times of one round, in which all contenders run in turn; medians over the
rounds with the smallest and largest. A second table has gradient checkpointing, bfloat16 autocast and
torch.compile (without graph breaks) on a small Llama of random weights.

    python benchmarks/speed/training.py   writes training.md and .json beside it, in 15 minutes
    python benchmarks/speed/training.py --quick   few cells; writes runs/training-quick.md and .json
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import subjects
import torch
from cells import FLOOR, MIDDLE, Cell, contenders, fill, ordered, sections
from measure import (
    Progress,
    Spread,
    Timed,
    Times,
    arguments,
    interleave,
    medians,
    overhead_ratios,
    ratios,
    table,
    write,
)
from subjects import Batch, Contender, Subject
from torch import Tensor, nn

CELLS = (
    Cell("MiniLM", 8, 64, 3),
    Cell("MiniLM", 8, 128, 1.5, (MIDDLE,)),
    Cell("MiniLM", 8, 256),
    Cell("SmolLM2-135M", 8, 64, 0.9),
    Cell("SmolLM2-135M", 8, 128, 0.5),
    Cell("Llama, width 2048, 2 layers", 8, 64),
    Cell("Llama, width 2048, 2 layers", 8, 128, 0.5),
)
QUICK_CELLS = (Cell("MiniLM", 8, 64, 1, (MIDDLE,)),)


def measure_cell(base: nn.Module, cell: Cell, rounds: int) -> list[dict[str, Any]]:
    """One entry for each contender."""
    batch = Batch.of(base, cell.rows, cell.length)
    compared = [subjects.put(base, contender) for contender in contenders(cell.ranks)]
    for subject in compared:
        subjects.check(subject, batch)
    steps = {subject.contender.key: timed_step(subject, batch) for subject in compared}
    times = interleave(steps, rounds, anchor=FLOOR.key, warm_up=0)  # the checks were steps too
    known = {"model": cell.model, "tokens": cell.tokens, "rounds": rounds}
    return [known | row for row in rows_of(times, [subject.contender for subject in compared])]


def timed_step(subject: Subject, batch: Batch, autocast: bool = False) -> Timed:
    """The step of one contender, and the change of its parameters before it."""
    return Timed(lambda: subjects.training_step(subject, batch, autocast), subject.bump)


def rows_of(times: Times, compared: Sequence[Contender]) -> list[dict[str, Any]]:
    """Median seconds and ratios of every contender."""
    seconds = medians(times)
    rows = []
    for contender in compared:
        key, lora = contender.key, Contender("lora", contender.rank).key
        beside = lora in times and key != lora
        rows.append(
            {
                "kind": contender.kind,
                "rank": contender.rank,
                "seconds": seconds[key],
                "to_floor": ratios(times, key, FLOOR.key),
                "to_lora": ratios(times, key, lora) if beside else None,
                "overhead_to_lora": overhead_ratios(times, key, lora, FLOOR.key)
                if beside
                else None,
            }
        )
    return rows


def table_of(entries: Sequence[dict[str, Any]]) -> str:
    """The table of one model: a row for each contender, three columns for each number of tokens."""
    tokens = sorted({entry["tokens"] for entry in entries})
    measures = {
        "to_floor": "time / floor",
        "to_lora": "time / LoRA",
        "overhead_to_lora": "overhead / LoRA",
    }
    found = {(e["kind"], e["rank"], e["tokens"]): e for e in entries}
    rows = []
    for kind, rank in dict.fromkeys((entry["kind"], entry["rank"]) for entry in ordered(entries)):
        cells = [found.get((kind, rank, number), {}) for number in tokens]
        values = [text(cell.get(measure)) for cell in cells for measure in measures]
        rows.append([subjects.LABELS[kind], rank or "", *values])
    head = [f"{title}, {number} tokens" for number in tokens for title in measures.values()]
    return table(["contender", "rank", *head], rows)


def section(entries: Sequence[dict[str, Any]]) -> list[str]:
    """What the page says of one model."""
    rounds = ", ".join(
        f"{number} at {tokens} tokens"
        for tokens, number in sorted({e["tokens"]: e["rounds"] for e in entries}.items())
    )
    return [f"Rounds: {rounds}.", table_of(entries)]


def text(value: Spread | None) -> str:
    """A ratio in a table."""
    return value.text() if value else ""


# Other ways to train


@dataclass(frozen=True)
class Variant:
    """A way to run the step.

    Attributes:
        title: name in the table.
        reentrant: kind of gradient checkpointing; None for none.
        autocast: in bfloat16.
        compiled: by torch.compile, ``fullgraph=True``.
    """

    title: str
    reentrant: bool | None = None
    autocast: bool = False
    compiled: bool = False

    @property
    def model(self) -> str:
        """Compiling takes long, so there are fewer layers."""
        return f"Llama, width 576, {2 if self.compiled else 6} layers"


VARIANTS = (
    Variant("plain"),
    Variant("checkpointing, reentrant", reentrant=True),
    Variant("checkpointing, not reentrant", reentrant=False),
    Variant("bfloat16 autocast", autocast=True),
    Variant("torch.compile, 2 layers", compiled=True),
)


def measure_variant(
    base: nn.Module, variant: Variant, kinds: Iterable[str], rounds: int
) -> list[dict[str, Any]]:
    """One entry for each contender that can be run this way."""
    batch = Batch.of(base, 8, 64)
    names = [FLOOR, *(Contender(kind, MIDDLE) for kind in kinds)]
    compared = []
    steps: dict[str, Timed] = {}
    facts: dict[str, dict[str, Any]] = {}
    for contender in names:
        subject = subjects.put(base, contender)
        step = timed_step(subject, batch, variant.autocast)
        facts[contender.kind] = {}
        if variant.reentrant is not None:
            checkpoint(subject.model, variant.reentrant)
        if variant.compiled:
            try:
                step, difference = compiled_step(subject, batch)
            except Exception as error:  # whatever a compiler raises: the table says so
                print(f"{contender.label} was not compiled: {str(error).splitlines()[0]}")
                continue
            facts[contender.kind]["difference"] = difference
        else:
            subjects.check(subject, batch)
        compared.append(contender)
        steps[contender.key] = step
    times = interleave(steps, rounds, anchor=FLOOR.key, warm_up=0)
    known = {"variant": variant.title, "tokens": 512, "rounds": rounds}
    return ordered(known | facts[row["kind"]] | row for row in rows_of(times, compared))


def checkpoint(model: nn.Module, reentrant: bool) -> None:
    """Turn gradient checkpointing on. The reentrant kind sees only inputs that require gradients, so
    the embedding's output is made to, for all contenders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()


def compiled_step(subject: Subject, batch: Batch) -> tuple[Timed, float]:
    """The compiled step, and how far its gradients are from the eager ones, in relative norm."""
    if subject.contender == FLOOR:
        mark_first_by_sum(subject, batch)
    subjects.training_step(subject, batch)
    eager = [gradient_of(parameter) for parameter in subject.parameters]
    loss = torch.compile(own_code(subjects.loss_of), fullgraph=True)

    def step() -> None:
        subject.clear()
        loss(subject.model, batch).backward()

    step()
    pairs = [(gradient_of(p), gradient) for p, gradient in zip(subject.parameters, eager)]
    difference = sum((own - other).square().sum() for own, other in pairs)
    size = sum(other.square().sum() for _, other in pairs)
    return Timed(step, subject.bump), float((difference / size).sqrt())


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Its gradient, apart from the parameter."""
    assert parameter.grad is not None
    return parameter.grad.clone()


def mark_first_by_sum(subject: Subject, batch: Batch) -> None:
    """Let the outputs of the first sites require gradients in a way that compiles: zeros that train
    are added to them. That is one sum in layer 0 more than the floor needs."""
    size = batch.inputs["input_ids"].shape
    subject.model.marks = nn.ParameterList()
    for module in subjects.first_sites(subject.model):
        module._forward_hooks.clear()
        zeros = nn.Parameter(torch.zeros(*size, module.out_features))
        module.register_forward_hook(lambda *call, zeros=zeros: call[-1] + zeros)
        subject.parameters.append(zeros)


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own: the compiler keeps what it compiled there, and one
    contender's guards are not to be tried before another's."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def table_of_variants(entries: Sequence[dict[str, Any]]) -> str:
    """A row for each way and contender."""
    plain = {e["kind"]: e["seconds"] for e in entries if e["variant"] == VARIANTS[0].title}
    rows = []
    for entry in entries:
        kind, difference = entry["kind"], entry.get("difference")
        same_model = "compile" not in entry["variant"]
        rows.append(
            [
                entry["variant"],
                subjects.LABELS[kind],
                text(entry["to_floor"]),
                text(entry["to_lora"]),
                text(entry["overhead_to_lora"]),
                f"{entry['seconds'] / plain[kind]:.2f}" if same_model else "",
                f"{difference:.1e}" if difference is not None else "",
            ]
        )
    head = ["way", "contender", "time / floor", "time / LoRA", "overhead / LoRA", "time / plain"]
    return table([*head, "gradient's distance from eager"], rows)


def main() -> None:
    """Measure all cells and write the tables."""
    options = arguments(__doc__, repetitions=8, quick=2)
    progress = Progress()

    def measured(base: nn.Module, cell: Cell) -> list[dict[str, Any]]:
        return measure_cell(base, cell, max(2, round(cell.share * options.repetitions)))

    entries = fill(QUICK_CELLS if options.quick else CELLS, measured, progress)
    variants = []
    kinds = ("cp", "lora") if options.quick else ("cp", "lora", "tucker", "tt")
    for variant in VARIANTS:
        if not (options.quick and variant.compiled):
            model = subjects.load(variant.model)
            variants += measure_variant(model, variant, kinds, options.repetitions)
            progress.say(variant.title)
    parts = ["Time of a training step; medians over the rounds [smallest, largest]."]
    parts += sections(entries, section)
    parts += [
        "## Other ways to train",
        f"Llama of width 576, random weights, rank {MIDDLE}, 512 tokens, {options.repetitions} rounds; "
        "each way has its own floor. `time / plain` is of medians of different rounds.",
        table_of_variants(variants),
    ]
    write(__file__, parts, {"cells": entries, "variants": variants}, quick=options.quick)


if __name__ == "__main__":
    main()
