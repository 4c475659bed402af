"""What do the products of CP's update take alone, without the pairs and the library around them?

The time of a training step above the floor, relative to that of PEFT LoRA, of lortalib's CP and of CP's
products alone: the pairs are parameters, a bare hook adds them. A 6-layer Llama of width 576, rank 8 on
q, k, v, o; with one thread and with all.

    python benchmarks/speed/least.py   writes least.md and .json beside it, in 5 minutes
    python benchmarks/speed/least.py --quick   few rounds; writes runs/least-quick.md and .json
"""

from __future__ import annotations

from typing import Any

import subjects
import torch
from cells import FLOOR
from measure import Progress, arguments, interleave, table, write
from subjects import Batch, Contender
from torch import nn
from training import rows_of, text, timed_step

MODEL = "Llama, width 576, 6 layers"
COMPARED = [FLOOR, *(Contender(kind, 8) for kind in ("cp", "products", "lora"))]
#: Rows of 64 tokens, and rounds relative to ``--repetitions``.
BATCHES = {8: 1.0, 32: 0.5}


def measure(base: nn.Module, rows: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    """One entry for each contender."""
    torch.set_num_threads(threads)
    batch = Batch.of(base, rows, 64)
    compared = [subjects.put(base, contender) for contender in COMPARED]
    for subject in compared:
        subjects.check(subject, batch)
    steps = {subject.contender.key: timed_step(subject, batch) for subject in compared}
    times = interleave(steps, rounds, anchor=FLOOR.key, every=1, warm_up=0)
    known = {"tokens": 64 * rows, "threads": threads, "rounds": rounds}
    return [known | row for row in rows_of(times, COMPARED)]


def main() -> None:
    """Measure all batches and write the table."""
    options = arguments(__doc__, repetitions=24, quick=2)
    progress, entries = Progress(), []
    base, most = subjects.load(MODEL), torch.get_num_threads()
    for threads in sorted({1, most}):
        for rows, share in BATCHES.items():
            entries += measure(base, rows, threads, max(2, round(share * options.repetitions)))
            progress.say(f"{64 * rows} tokens, {threads} threads")
    lines = [
        [
            entry["tokens"],
            entry["threads"],
            subjects.LABELS[entry["kind"]],
            text(entry["to_floor"]),
            text(entry["overhead_to_lora"]),
        ]
        for entry in entries
        if entry["kind"] != "floor"
    ]
    head = ["tokens", "threads", "contender", "time / floor", "overhead / LoRA"]
    rounds = ", ".join(
        f"{round(s * options.repetitions)} at {64 * r} tokens" for r, s in BATCHES.items()
    )
    parts = [f"{MODEL}, rank 8. Rounds: {rounds}.", table(head, lines)]
    write(__file__, parts, {"cells": entries}, quick=options.quick)


if __name__ == "__main__":
    main()
