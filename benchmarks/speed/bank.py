"""What does it cost to give every row of a batch an adapter of its own, and how many can there be?

* A batch of 64 rows that use 64 different adapters: the base alone, the bank (gathering anew in each
  forward, and within one context as in generate()), and PEFT LoRA's ``adapter_names`` at the same rank.
  Rows a second relative to PEFT's, and the time above the base beside PEFT's. Checked: every row has the
  output that its adapter alone on the model gives.
* Adapters of SmolLM2-135M (CP, rank 1, bfloat16) in one bank, 10^3 to 10^6: bytes for each by the growth
  of the process, seconds to store one, microseconds to add or replace one while the bank is full, and to
  look up and gather 64 at random.

Ratios are of times of one round; medians over the rounds with the smallest and largest.

    python benchmarks/speed/bank.py   writes bank.md and .json beside it, in 5 minutes
    python benchmarks/speed/bank.py --quick   MiniLM and up to 10^4; writes runs/bank-quick.md and .json
"""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass
from typing import Any

import peft
import subjects
import torch
from measure import (
    MIB,
    Progress,
    Timed,
    Times,
    arguments,
    interleave,
    ratios,
    resident,
    seconds,
    spread,
    table,
    write,
)
from torch import Tensor, nn

import lortalib
from lortalib.nn import Bank

ROWS = 64
SIZES = (10**3, 10**4, 10**5, 10**6)


@dataclass(frozen=True)
class Cell:
    """A model, tokens of a row, and a rank."""

    model: str
    tokens: int
    rank: int


CELLS = (
    Cell("MiniLM", 4, 1),
    Cell("MiniLM", 4, 8),
    Cell("MiniLM", 16, 8),
    Cell("SmolLM2-135M", 1, 1),
    Cell("SmolLM2-135M", 1, 8),
)


def measure_cell(cell: Cell, rounds: int) -> dict[str, Any]:
    """Times of the contenders on one model, and how far a row is from its adapter alone."""
    base = subjects.load(cell.model).eval().requires_grad_(False)
    ids = torch.randint(5, 900, (ROWS, cell.tokens), generator=torch.Generator().manual_seed(0))
    banked = subjects.twin(base)
    bank = lortalib.nn.bank(banked, "cp", cell.rank, capacity=ROWS)
    stack = random_stack(bank, ROWS)
    bank.fill(range(ROWS), stack)
    error, effect = compare(base, banked, bank, stack, ids, cell.rank)
    rival, names = peft_model(base, cell.rank)

    def each() -> None:
        with bank.using(range(ROWS)):
            banked(input_ids=ids)

    kept = subjects.twin(base)
    second = lortalib.nn.bank(kept, "cp", cell.rank, capacity=ROWS)
    second.fill(range(ROWS), stack)
    open_bank = second.using(range(ROWS))
    with torch.no_grad(), open_bank:
        times = interleave(
            {
                "base": Timed(lambda: base(input_ids=ids)),
                "bank": Timed(each),
                "bank, context open": Timed(lambda: kept(input_ids=ids)),
                "PEFT adapter_names": Timed(lambda: rival(input_ids=ids, adapter_names=names)),
            },
            rounds,
        )
    return {"cell": cell.__dict__, "times": times, "error": error, "effect": effect}


def random_stack(bank: Bank, number: int) -> dict[str, list[Tensor]]:
    """So many random adapters, for `Bank.fill`."""
    return {
        name: [torch.randn(number, *tensor.shape) for tensor in tensors]
        for name, tensors in bank[None].items()
    }


def compare(
    base: nn.Module, banked: nn.Module, bank: Bank, stack: Any, ids: Tensor, rank: int
) -> tuple[float, float]:
    """Largest difference of a row from its adapter alone, and from the base, for four rows."""
    with torch.no_grad():
        with bank.using(range(ROWS)):
            mixed = banked(input_ids=ids)[0]
        plain = base(input_ids=ids)[0]
        alone = subjects.twin(base)
        adapter = lortalib.nn.apply(alone, "cp", rank)
        error = effect = 0.0
        for row in (0, 1, ROWS // 2, ROWS - 1):
            for group in adapter.groups:
                for parameter, values in zip(adapter.network(group).tensors, stack[group.name]):
                    parameter.copy_(values[row])
            wanted = alone(input_ids=ids[row : row + 1])[0][0]
            error = max(error, (mixed[row] - wanted).abs().max().item())
            effect = max(effect, (plain[row] - wanted).abs().max().item())
    return error, effect


def peft_model(base: nn.Module, rank: int) -> tuple[nn.Module, list[str]]:
    """PEFT's model with as many LoRA adapters as rows, and their names."""
    model = subjects.twin(base)
    targets = sorted({site.path for site in lortalib.nn.sites(model)})
    config = peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
    names = [f"adapter{k}" for k in range(ROWS)]
    wrapped = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    return wrapped.eval(), names


def measure_sizes(sizes: tuple[int, ...], progress: Progress) -> list[dict[str, Any]]:
    """One bank that is filled up step by step."""
    model = subjects.load("SmolLM2-135M").eval()
    bank = lortalib.nn.bank(model, "cp", 1, capacity=max(sizes), dtype=torch.bfloat16)
    draw = random.Random(0)
    one = {name: [t[0] for t in tensors] for name, tensors in random_stack(bank, 1).items()}
    ids = torch.randint(5, 900, (ROWS, 1), generator=torch.Generator().manual_seed(0))
    # What forwards and the tensors on their way into the bank leave in the process is not counted.
    bank.add("first", one)
    forward(model, bank, ["first"] * ROWS, ids)
    random_stack(bank, 10_000)
    gc.collect()
    before = resident()
    rows = []
    for size in sizes:
        begin = time.perf_counter()
        while len(bank) <= size:
            number = min(10_000, size + 1 - len(bank))
            names = [f"user-{len(bank) - 1 + k}" for k in range(number)]
            bank.fill(names, random_stack(bank, number))
        filled = time.perf_counter() - begin
        gc.collect()
        held = resident() - before
        chosen = [f"user-{draw.randrange(size)}" for _ in range(ROWS)]
        rows.append(
            {
                "adapters": size,
                "bytes": held / size,
                "parameters": bank.count(),
                "fill": filled,
                "replace": seconds(lambda n=size: bank.add(f"user-{draw.randrange(n)}", one), 50),
                "gather": seconds(lambda names=chosen: gather(bank, names), 50),
                "forward": forward(model, bank, chosen, ids),
            }
        )
        progress.say(f"{size:,} adapters")
    return rows


def gather(bank: Bank, names: list[str]) -> None:
    """Look up and gather the rows of a batch."""
    with bank.using(names):
        pass


def forward(model: nn.Module, bank: Bank, names: list[str], ids: Tensor) -> float:
    """Median seconds of a forward with these rows."""

    def run() -> None:
        with torch.no_grad(), bank.using(names):
            model(input_ids=ids)

    return seconds(run, 5)


def mixed_table(found: list[dict[str, Any]]) -> str:
    """The first question's table."""
    rows = []
    for entry in found:
        cell, times = entry["cell"], entry["times"]
        rows.append(
            (
                cell["model"],
                cell["tokens"],
                cell["rank"],
                *(ratios(times, name, "base").text() for name in list(times)[1:]),
                ratios(times, "PEFT adapter_names", "bank").text(1),
                ratios(times, "PEFT adapter_names", "bank, context open").text(1),
                above(times, "bank, context open"),
                f"{entry['error']:.1e} of {entry['effect']:.1f}",
            )
        )
    head = (
        "model", "tokens a row", "rank", "bank / base", "bank, context open / base",
        "PEFT / base", "rows a second, bank / PEFT", "rows a second, context open / PEFT",
        "time above the base, PEFT / context open", "row against its adapter alone",
    )  # fmt: skip
    return table(head, rows)


def above(times: Times, name: str) -> str:
    """PEFT's time above the base relative to the bank's, where the bank's can be told from 0."""
    rows = zip(times["PEFT adapter_names"], times[name], times["base"])
    values = [(rival - floor) / (own - floor) for rival, own, floor in rows if own > floor]
    return spread(values).text(0) if values else "-"


def size_table(found: list[dict[str, Any]]) -> str:
    """The second question's table."""
    head = (
        "adapters", "trainable parameters of each", "bytes of each, in the process", "to fill, s",
        "replace one, µs", "look up and gather 64, µs", "forward of 64 rows, ms",
    )  # fmt: skip
    return table(
        head,
        [
            (
                f"{row['adapters']:,}",
                row["parameters"],
                f"{row['bytes']:,.0f}",
                f"{row['fill']:.1f}",
                f"{row['replace'] * 1e6:.0f}",
                f"{row['gather'] * 1e6:.0f}",
                f"{row['forward'] * 1e3:.0f}",
            )
            for row in found
        ],
    )


def main() -> None:
    """Measure, print progress, write."""
    options = arguments(__doc__, repetitions=7)
    torch.manual_seed(0)
    progress = Progress()
    sizes = measure_sizes(SIZES[:2] if options.quick else SIZES, progress)
    cells = []
    for cell in CELLS[1:2] if options.quick else CELLS:
        cells.append(measure_cell(cell, options.repetitions))
        progress.say(f"{cell.model}, {cell.tokens} tokens, rank {cell.rank}")
    total = sizes[-1]["bytes"] * sizes[-1]["adapters"] / MIB
    parts = [
        f"## {ROWS} adapters in a batch of {ROWS}",
        mixed_table(cells),
        "## How many adapters",
        f"Adapters of SmolLM2-135M, CP of rank 1, bfloat16; the last bank takes {total:,.0f} MiB.",
        size_table(sizes),
    ]
    write(__file__, parts, {"mixed": cells, "sizes": sizes}, quick=options.quick)


if __name__ == "__main__":
    main()
