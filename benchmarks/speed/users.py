"""What do many users cost, with sides of their own and with shared sides?

* Batches whose rows name 1, 8, 64 or 1,000 distinct adapters in turn: with sides of their own, with shared
  ``in`` and ``out``, and as LoRAs of PEFT of the same rank, by ``adapter_names``. Every batch gathers its
  rows anew. Reported are rows a second relative to the base alone and to one adapter of the same format on
  the model (for PEFT, to a LoRA of PEFT that is the only one), as ratios of process times of one round.
  One of the formats is that of joint diagonalisation: a p x q matrix between two sides, for each weight.
* Adapters of the shape of Llama-3-8B in one bank (CP of rank 16, bfloat16, shared sides; no weights are
  needed for it), 10^3 to 10^6: bytes of each, and microseconds to look up and gather 64 at random.

Ratios are medians over the rounds, with the smallest and largest.

    python benchmarks/speed/users.py   writes users.md and .json beside it, in 15 minutes
    python benchmarks/speed/users.py --quick   one model and up to 10^4; writes runs/users-quick.md and .json
"""

from __future__ import annotations

import copy
import gc
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import peft
import subjects
import torch
from measure import (
    MIB,
    Progress,
    Spread,
    Timed,
    Times,
    arguments,
    interleave,
    resident,
    seconds,
    spread,
    table,
    write,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lortalib
from lortalib.nn import Bank

SHARED = ("in", "out")
#: How many distinct adapters the rows name in turn. With own sides, a row costs the same however many.
DISTINCT = {"shared": (1, 8, 64, 1000), "own": (64, 1000), "PEFT LoRA": (1, 8, 64, 1000)}
#: 1,000 LoRAs of SmolLM2 are 240,000 modules with 7 GiB in PEFT: left out.
PEFT_HOLDS = {"MiniLM": 1000, "SmolLM2-135M": 64}
JOINT = "layer matrix in p, layer matrix p q, layer matrix head out q"
NAMES = {JOINT: "joint diagonalisation"}
SIZES = (10**3, 10**4, 10**5, 10**6)
ADAPTERS = 1000


@dataclass(frozen=True)
class Cell:
    """A model, rows of a batch, tokens of a row, and a format of rank 16."""

    model: str
    rows: int
    tokens: int
    decomposition: str


CELLS = (
    Cell("MiniLM", 64, 8, "cp"),
    Cell("MiniLM", 64, 8, "indscal"),
    Cell("MiniLM", 64, 8, JOINT),
    Cell("MiniLM", 1000, 1, "cp"),
    Cell("SmolLM2-135M", 64, 1, "cp"),
    Cell("SmolLM2-135M", 64, 1, "indscal"),
    Cell("SmolLM2-135M", 64, 1, JOINT),
)
#: 1,000 adapters with sides of their own are 7 GiB here, as LoRAs are.
TOO_LARGE = CELLS[-1]
QUICK = (Cell("MiniLM", 64, 4, "cp"),)


def measure_cell(cell: Cell, rounds: int) -> dict[str, Any]:
    """Times of the contenders on one model, and how far a row is from its adapter alone."""
    base = subjects.load(cell.model).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 900, (cell.rows, cell.tokens), generator=draw)
    alone = subjects.twin(base)
    lortalib.nn.apply(alone, cell.decomposition, 16, init="normal")
    contenders = {
        "base": Timed(lambda: base(input_ids=ids)),
        "one adapter": Timed(lambda: alone(input_ids=ids)),
    }
    errors = {}
    for sides, shared in (("shared", SHARED), ("own", ())):
        if cell == TOO_LARGE and sides == "own":
            continue
        model = subjects.twin(base)
        bank = lortalib.nn.bank(model, cell.decomposition, 16, shared=shared, capacity=ADAPTERS)
        fill(bank, range(ADAPTERS))
        errors[sides] = row_alone(model, bank, ids)
        for distinct in DISTINCT[sides]:
            contenders[f"{sides} {distinct}"] = Timed(in_turn(model, bank, ids, distinct))
    single, several = (peft_model(base, number) for number in (1, PEFT_HOLDS[cell.model]))
    contenders["one LoRA"] = Timed(lambda: single(input_ids=ids))
    errors["PEFT LoRA"] = None
    for distinct in DISTINCT["PEFT LoRA"]:
        if distinct <= PEFT_HOLDS[cell.model]:
            contenders[f"PEFT LoRA {distinct}"] = Timed(by_name(several, ids, distinct))
    with torch.no_grad():
        times = interleave(contenders, rounds, clock=time.process_time)
    return {"cell": cell.__dict__, "times": times, "errors": errors, "load": os.getloadavg()[1]}


def fill(bank: Bank, names: range) -> None:
    """Fill a bank with random adapters."""
    stack: dict[str, list[Tensor]] = {}
    for name, tensors in bank[None].items():
        own = [term for term in bank.legs[name].terms if not term.shared]
        stack[name] = []
        for term, tensor in zip(own, tensors):
            drawn = stack[name][-1] if term.tied else torch.randn(len(names), *tensor.shape)
            stack[name].append(drawn)
    bank.fill(names, stack)


def in_turn(model: nn.Module, bank: Bank, ids: Tensor, distinct: int) -> Callable[[], None]:
    """A call that gives the rows of a batch the next ones of so many adapters."""
    places: Iterator[int] = count()

    def call() -> None:
        with bank.using([next(places) % distinct for _ in range(len(ids))]):
            model(input_ids=ids)

    return call


def peft_model(base: nn.Module, number: int) -> nn.Module:
    """PEFT's model with so many LoRAs.

    They are put into its layers, as ``add_adapter`` does; that itself looks at all adapters before, and so
    needs a quarter of an hour for 1,000.
    """
    model = subjects.twin(base)
    targets = sorted({site.path for site in lortalib.nn.sites(model)})
    config = peft.LoraConfig(r=16, target_modules=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="0")
    layers = [module for module in wrapped.modules() if isinstance(module, LoraLayer)]
    for name in map(str, range(1, number)):
        for layer in layers:
            layer.scaling[name], layer.lora_dropout[name] = layer.scaling["0"], nn.Identity()
            for sides in (layer.lora_A, layer.lora_B):
                sides[name] = copy.deepcopy(sides["0"])
                sides[name].reset_parameters()
    return wrapped.eval()


def by_name(model: nn.Module, ids: Tensor, distinct: int) -> Callable[[], None]:
    """The same as `in_turn`, for PEFT."""
    places: Iterator[int] = count()

    def call() -> None:
        names = [str(next(places) % distinct) for _ in range(len(ids))]
        model(input_ids=ids, adapter_names=names)

    return call


def row_alone(model: nn.Module, bank: Bank, ids: Tensor) -> float:
    """Largest difference of three rows from what they are in a batch of one row."""
    names, error = range(len(ids)), 0.0
    with torch.no_grad():
        with bank.using(names):
            mixed = model(input_ids=ids)[0]
        for row in (0, len(ids) // 2, len(ids) - 1):
            with bank.using([names[row]]):
                wanted = model(input_ids=ids[row : row + 1])[0][0]
            error = max(error, (mixed[row] - wanted).abs().max().item())
    return error


def measure_sizes(sizes: tuple[int, ...], progress: Progress) -> list[dict[str, Any]]:
    """One bank of the shape of Llama-3-8B that is filled up step by step."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    bank = lortalib.nn.bank(
        model, "cp", 16, shared=SHARED, capacity=max(sizes) + 1, dtype=torch.bfloat16, device="cpu"
    )
    fill(bank, range(-1, 0))
    gc.collect()
    draw, before, rows = random.Random(0), resident(), []
    for size in sizes:
        begin = time.perf_counter()
        for start in range(len(bank) - 1, size, 10_000):
            fill(bank, range(start, min(start + 10_000, size)))
        filled = time.perf_counter() - begin
        gc.collect()
        chosen = [draw.randrange(size) for _ in range(64)]
        rows.append(
            {
                "adapters": size,
                "parameters": bank.count(),
                "bytes": bank.nbytes / len(bank),
                "resident": resident() - before,
                "fill": filled,
                "gather": seconds(lambda names=chosen: gather(bank, names), 200),
            }
        )
        progress.say(f"{size:,} adapters")
    return rows


def gather(bank: Bank, names: list[int]) -> None:
    """Look up and gather the rows of a batch."""
    with bank.using(names):
        pass


def relative(times: Times, name: str, other: str) -> Spread:
    """Rows a second of one contender relative to another's in the same round."""
    return spread(b / a for a, b in zip(times[name], times[other]))


def rows_table(found: list[dict[str, Any]]) -> str:
    """The first question's table."""
    rows = []
    for entry in found:
        cell, times = entry["cell"], entry["times"]
        for sides in entry["errors"]:
            one = "one LoRA" if sides == "PEFT LoRA" else "one adapter"
            error = entry["errors"][sides]
            rows.append(
                (
                    cell["model"],
                    f"{cell['rows']:,} x {cell['tokens']}",
                    NAMES.get(cell["decomposition"], cell["decomposition"]),
                    sides,
                    relative(times, one, "base").text(),
                    *(
                        relative(times, f"{sides} {number}", one).text()
                        if f"{sides} {number}" in times
                        else ""
                        for number in DISTINCT["shared"]
                    ),
                    "" if error is None else f"{error:.0e}",
                )
            )
    head = (
        "model", "rows x tokens", "format", "sides", "one adapter / base",
        *(f"{number:,} / one adapter" for number in DISTINCT["shared"]), "row against its adapter alone",
    )  # fmt: skip
    return table(head, rows)


def size_table(found: list[dict[str, Any]]) -> str:
    """The second question's table."""
    head = (
        "adapters", "parameters of each", "bytes of each", "growth of the process, MiB", "to fill, s",
        "look up and gather 64, µs",
    )  # fmt: skip
    return table(
        head,
        [
            (
                f"{row['adapters']:,}",
                f"{row['parameters']:,}",
                f"{row['bytes']:,.0f}",
                f"{row['resident'] / MIB:,.0f}",
                f"{row['fill']:.1f}",
                f"{row['gather'] * 1e6:.0f}",
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
    for cell in QUICK if options.quick else CELLS:
        cells.append(measure_cell(cell, options.repetitions))
        progress.say(f"{cell.model}, {cell.rows} x {cell.tokens}, {cell.decomposition}")
    loads = [cell["load"] for cell in cells]
    parts = [
        "## Distinct adapters in turn",
        "Rows a second, as ratios of process times; rank 16. "
        f"Load of the machine (mean number of running processes): {min(loads):.1f} to {max(loads):.1f}.",
        rows_table(cells),
        "## How many adapters",
        "Adapters of the shape of Llama-3-8B: CP of rank 16, q, k, v and o, bfloat16, shared sides.",
        size_table(sizes),
    ]
    write(__file__, parts, {"rows": cells, "sizes": sizes}, quick=options.quick)


if __name__ == "__main__":
    main()
