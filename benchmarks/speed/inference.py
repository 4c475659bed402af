"""What does an adapter cost when a model serves: merged, unmerged, and when adapters are switched?

On SmolLM2-135M without gradients, every contender on q, k, v, o of every layer:

* merged: forward of a merged model relative to the base; an untouched copy of the base shows what the
  place of the weights in memory makes out. That every module and parameter is the very object it was,
  with no hook on it, is checked, and that unmerging restores every bit.
* unmerged: prefill (1 row of 512 tokens, 8 rows of 64) and decoding of one token with a cache (1 and 8
  rows after 64 tokens), relative to the base and to PEFT LoRA, and the time above the base relative to
  PEFT LoRA's.
* switching: microseconds to make another of 4 adapters the active one, beside PEFT's ``set_adapter``;
  and decoding of a token right after a switch relative to one without, as work may be put off.

Ratios are of times of one round; medians over the rounds with the smallest and largest.

    python benchmarks/speed/inference.py   writes inference.md and .json beside it, in 6 minutes
    python benchmarks/speed/inference.py --quick   few cells; writes runs/inference-quick.md and .json
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import subjects
import torch
from measure import (
    Progress,
    Spread,
    Timed,
    arguments,
    interleave,
    overhead_ratios,
    ratios,
    spread,
    table,
    write,
)
from subjects import LORTALIB, Contender, Subject
from torch import Tensor, nn

import lortalib

MODEL = "SmolLM2-135M"
RANKS = (4, 16, 64)
PAST = 64  # tokens in the cache before a decoded one
BASE = Contender("base")
SWITCHED = ("one", "two", "three", "four")
SWITCHED_RANK = 8


@dataclass(frozen=True)
class Cell:
    """One way to run a model.

    Attributes:
        title: name in the tables.
        rows: sequences.
        length: tokens of a sequence that are read at once.
        past: tokens in the cache.
        share: rounds relative to ``--repetitions``.
    """

    title: str
    rows: int
    length: int
    past: int = 0
    share: float = 1.0


CELLS = (
    Cell("prefill 1x512", 1, 512),
    Cell("prefill 8x64", 8, 64),
    Cell("decode, 1 row", 1, 1, PAST, 5),
    Cell("decode, 8 rows", 8, 1, PAST, 5),
)
QUICK_CELLS = (Cell("prefill 2x64", 2, 64), Cell("decode, 1 row", 1, 1, PAST, 3))


def forward(model: nn.Module, cell: Cell) -> Timed:
    """A forward of this kind; between two of them the cache is cut back."""
    tokens = torch.randint(5, 40_000, (cell.rows, cell.past + cell.length))
    if not cell.past:
        return Timed(lambda: model(input_ids=tokens, use_cache=False))
    past, last = tokens[:, : cell.past], tokens[:, cell.past :]
    cache = model(input_ids=past, use_cache=True).past_key_values

    def cut_back() -> None:
        if cache.get_seq_length() > cell.past:
            cache.crop(cell.past - cache.get_seq_length())

    return Timed(lambda: model(input_ids=last, past_key_values=cache, use_cache=True), cut_back)


# Merged


def merged_model(base: nn.Module) -> nn.Module:
    """A copy of the base with an adapter merged into weights of its own, checked."""
    model = copy.deepcopy(base)
    before = anatomy(model)
    adapter = lortalib.nn.apply(model, "cp", 16)
    Subject(Contender("cp", 16), model, list(adapter.parameters()), 0).perturb()
    adapter.merge()
    if anatomy(model) != before:
        raise RuntimeError("merging replaced a module or parameter, or left a hook")
    if torch.equal(first_weight(model), first_weight(base)):
        raise RuntimeError("merging changed no weight")
    adapter.unmerge()
    weights = dict(model.named_parameters())
    if not all(torch.equal(weights[name], value) for name, value in base.named_parameters()):
        raise RuntimeError("unmerging did not restore every bit")
    adapter.merge()
    return model


def anatomy(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Which objects a model is made of, apart from the adapter: modules with their class and hooks,
    and parameters."""
    found: dict[str, tuple[object, ...]] = {}
    for path, module in model.named_modules():
        if not path.startswith("lortalib"):
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            found[path] = (id(module), type(module), hooks)
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                found[name] = (id(parameter), parameter.data_ptr())
    return found


def first_weight(model: nn.Module) -> Tensor:
    """The weight of the first site."""
    weight = model.get_submodule(lortalib.nn.sites(model)[0].path).weight
    assert isinstance(weight, Tensor)
    return weight


def measure_merged(base: nn.Module, cells: Sequence[Cell], rounds: int) -> list[dict[str, Any]]:
    """Ratios of the merged model and of an untouched copy to the base."""
    models = {"base": base, "untouched copy": copy.deepcopy(base), "merged": merged_model(base)}
    rows = []
    for cell in cells:
        contenders = {name: forward(model, cell) for name, model in models.items()}
        # There are only three contenders, so each may have more rounds.
        times = interleave(contenders, round(cell.share * rounds) * 2, anchor="base", every=1)
        rows += [
            {"cell": cell.title, "model": name, "to_base": ratios(times, name, "base")}
            for name in ("untouched copy", "merged")
        ]
    return rows


def table_of_merged(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each model, a column for each cell."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["model"], row["cell"]): row["to_base"].text(3) for row in rows}
    lines = [[model, *(found[model, cell] for cell in cells)] for model in models]
    return table(["time / base", *cells], lines)


# Unmerged


def measure_unmerged(compared: Sequence[Subject], cell: Cell, rounds: int) -> list[dict[str, Any]]:
    """Ratios of every contender to the base and, above it, to PEFT LoRA."""
    forwards = {subject.contender.key: forward(subject.model, cell) for subject in compared}
    times = interleave(forwards, max(2, round(cell.share * rounds)), anchor="base", every=4)
    rows = []
    for contender in (subject.contender for subject in compared[1:]):
        lora = Contender("lora", contender.rank).key
        own = contender.kind == "lora"
        rows.append(
            {
                "cell": cell.title,
                "kind": contender.kind,
                "rank": contender.rank,
                "to_base": ratios(times, contender.key, "base"),
                "to_lora": None if own else ratios(times, contender.key, lora),
                "overhead_to_lora": None
                if own
                else overhead_ratios(times, contender.key, lora, "base"),
            }
        )
    return rows


def table_of_unmerged(rows: Sequence[dict[str, Any]], phase: str) -> str:
    """A row for each contender, three columns for each cell of this phase."""
    cells = list(dict.fromkeys(row["cell"] for row in rows if row["cell"].startswith(phase)))
    measures = {
        "to_base": "time / base",
        "to_lora": "time / LoRA",
        "overhead_to_lora": "overhead / LoRA",
    }
    found = {(row["kind"], row["rank"], row["cell"]): row for row in rows}
    kinds = list(subjects.LABELS)
    lines = []
    for kind, rank in sorted({key[:2] for key in found}, key=lambda k: (kinds.index(k[0]), k[1])):
        values: list[Spread | None] = [
            found[kind, rank, cell][measure] for cell in cells for measure in measures
        ]
        texts = [value.text() if value else "" for value in values]
        lines.append([subjects.LABELS[kind], rank, *texts])
    head = [f"{title}, {cell}" for cell in cells for title in measures.values()]
    return table(["contender", "rank", *head], lines)


# Switching


def switched_models(base: nn.Module) -> dict[str, tuple[nn.Module, Callable[[str], object]]]:
    """Models with several adapters, and what makes one of them the active one."""
    own = subjects.twin(base)
    for name in SWITCHED:
        lortalib.nn.apply(own, "cp", SWITCHED_RANK, name=name)
    contender = Contender("lora", SWITCHED_RANK)
    other = subjects.twin(base)
    wrapped = subjects.peft_model(other, contender, SWITCHED[0])
    paths = [site.path for site in lortalib.nn.sites(own)]
    for name in SWITCHED[1:]:
        wrapped.add_adapter(name, subjects.peft_config(contender, paths))
    assert isinstance(wrapped, peft.PeftModel)
    models = {
        "lortalib CP": (own, lambda name: lortalib.nn.set_active(own, name)),
        "PEFT LoRA": (wrapped.get_base_model(), wrapped.set_adapter),
    }
    shared = set(base.parameters())
    for model, _ in models.values():
        factors = [parameter for parameter in model.parameters() if parameter not in shared]
        Subject(contender, model, factors, 0).perturb()
        model.eval()
    return models


def measure_switching(base: nn.Module, switches: int, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of a switch, and a decoded token after a switch relative to one without."""
    models = switched_models(base)
    names = itertools.cycle(SWITCHED)
    plain = {
        label: Timed(lambda switch=switch: switch(next(names)))
        for label, (_, switch) in models.items()
    }
    times = interleave(plain, switches, warm_up=2 * len(SWITCHED))
    cell = Cell("", 1, 1, PAST)
    decode: dict[str, Timed] = {}
    for label, (model, switch) in models.items():
        timed = forward(model, cell)
        decode[f"{label}, same"] = timed

        def switched(timed: Timed = timed, switch: Callable[[str], object] = switch) -> None:
            switch(next(names))
            timed.run()

        decode[f"{label}, switched"] = Timed(switched, timed.prepare)
    after = interleave(decode, rounds, warm_up=2)
    return [
        {
            "library": label,
            "microseconds": spread(1e6 * seconds for seconds in times[label]),
            "decode_after": ratios(after, f"{label}, switched", f"{label}, same"),
        }
        for label in models
    ]


def table_of_switching(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each library."""
    lines = [
        [row["library"], row["microseconds"].text(1), row["decode_after"].text()] for row in rows
    ]
    return table(
        ["adapters", "switch, microseconds", "switch and decode a token / decode a token"], lines
    )


def main() -> None:
    """Measure all three and write the tables."""
    options = arguments(__doc__, repetitions=6, quick=2)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    progress = Progress()
    base = subjects.load(MODEL).eval()
    cells = QUICK_CELLS if options.quick else CELLS
    merged = measure_merged(base, cells, options.repetitions)
    progress.say("merged")
    ranks = RANKS[1:2] if options.quick else RANKS
    kinds = (*LORTALIB, "lora")
    compared = [subjects.put(base, Contender(kind, rank)) for rank in ranks for kind in kinds]
    compared.insert(0, subjects.put(base, BASE))
    for subject in compared:
        subject.model.eval()
    unmerged = []
    for cell in cells:
        unmerged += measure_unmerged(compared, cell, options.repetitions)
        progress.say(f"unmerged, {cell.title}")
    del compared
    switching = measure_switching(base, 40 * options.repetitions, 4 * options.repetitions)
    progress.say("switching")
    parts = [
        f"{MODEL}, medians over the rounds [smallest, largest].",
        "## Merged",
        "Every module, class and parameter is the very object it was, and none has a hook; unmerging "
        "restores every bit (checked in this run).",
        table_of_merged(merged),
        "## Unmerged",
        table_of_unmerged(unmerged, "prefill"),
        table_of_unmerged(unmerged, "decode"),
        "## Switching",
        f"Among {len(SWITCHED)} adapters of rank {SWITCHED_RANK} on 30 layers.",
        table_of_switching(switching),
    ]
    data = {"merged": merged, "unmerged": unmerged, "switching": switching}
    write(__file__, parts, data, quick=options.quick)


if __name__ == "__main__":
    main()
