"""How much memory does a training step take with an adapter, above what the frozen base needs?

The step, the contenders and the floor are those of `training`. Measured, for each model, number of
tokens and rank:

* peak: the largest number of bytes of tensors alive at once during one step, without the base's
  weights, with the adapter's parameters and their gradients. Every tensor storage is counted from
  the operation that makes it until it is freed; that agrees with the bytes that torch's allocator
  reports to its profiler. The table has the difference from the floor's peak.
* saved: bytes of the tensors that the forward saves for the backward, each storage once, without the
  parameters and buffers of model and adapter. The table has the difference from the floor.
* held: bytes alive after the forward. What is held and not saved, beyond the floor's, is what a library
  keeps where the hooks on saved tensors do not see it.

These are counts, the same in every run, so there are no repetitions.

    python benchmarks/speed/memory.py   writes memory.md and .json beside it, in 4 minutes
    python benchmarks/speed/memory.py --quick   few cells; writes runs/memory-quick.md and .json
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import subjects
import torch
from cells import MIDDLE, RANKS, Cell, contenders, fill, ordered, sections
from measure import MIB, Progress, arguments, table, write
from subjects import Batch, Subject
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CELLS = (
    Cell("MiniLM", 8, 64),
    Cell("MiniLM", 8, 128, ranks=(MIDDLE,)),
    Cell("MiniLM", 8, 256),
    Cell("SmolLM2-135M", 8, 64),
    Cell("SmolLM2-135M", 8, 128, ranks=(MIDDLE,)),
    Cell("Llama, width 2048, 2 layers", 8, 64),
    Cell("Llama, width 2048, 2 layers", 8, 128, ranks=(MIDDLE,)),
)
QUICK_CELLS = (
    Cell("MiniLM", 8, 64, ranks=RANKS),
    Cell("Llama, width 576, 6 layers", 8, 64, ranks=(MIDDLE,)),
)


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they live.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at once.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        # Storages go by the address of their C++ part, which stays while they live.
        self.known = {storage_key(tensor) for tensor in known}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and storage_key(tensor) not in self.known:
                self._enter(tensor)
        return result

    def _enter(self, tensor: Tensor) -> None:
        key, storage = storage_key(tensor), tensor.untyped_storage()
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key, storage.nbytes())

    def _leave(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def storage_key(tensor: Tensor) -> int:
    """What tells storages apart."""
    return tensor.untyped_storage()._cdata


def own_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, of the adapter too; also those that torch does not call buffers."""
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        found += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return found


def peak_of(subject: Subject, batch: Batch) -> int:
    """Largest number of bytes alive during a step, and those of the adapter's parameters."""
    subject.clear()
    gc.collect()
    with Alive(own_tensors(subject.model)) as alive:
        subjects.training_step(subject, batch)
    subject.clear()
    return alive.peak + parameter_bytes(subject)


def parameter_bytes(subject: Subject) -> int:
    """Bytes of what trains."""
    return sum(parameter.numel() * parameter.element_size() for parameter in subject.parameters)


def saved_by(subject: Subject, batch: Batch) -> tuple[int, int]:
    """Bytes of the storages that one forward saves for the backward, and of all alive after it."""
    own = {storage_key(tensor) for tensor in own_tensors(subject.model)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in own:
            saved[storage_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # without its graph, so that no output holds on to itself

    gc.collect()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with Alive(own_tensors(subject.model)) as alive, hooks:
        loss = subjects.loss_of(subject.model, batch)
    held = alive.now
    del loss
    return sum(saved.values()), held


def measure_cell(base: nn.Module, cell: Cell) -> list[dict[str, Any]]:
    """One entry for each contender; the first is the floor."""
    batch = Batch.of(base, cell.rows, cell.length)
    entries: list[dict[str, Any]] = []
    for contender in contenders(cell.ranks):
        subject = subjects.put(base, contender)
        saved, held = saved_by(subject, batch)
        subject.bump()
        peak = peak_of(subject, batch)
        floor = entries[0] if entries else {"peak": peak, "saved": saved}
        entries.append(
            {
                "model": cell.model,
                "tokens": cell.tokens,
                "kind": contender.kind,
                "rank": contender.rank,
                "peak": peak,
                "saved": saved,
                "held": held,
                "parameters": parameter_bytes(subject),
                "peak_above_floor": peak - floor["peak"],
                "saved_above_floor": saved - floor["saved"],
            }
        )
    return entries


def table_of(entries: Sequence[dict[str, Any]]) -> str:
    """The table of one model: a row for each contender, two columns for each number of tokens."""
    tokens = sorted({entry["tokens"] for entry in entries})
    found = {(e["kind"], e["rank"], e["tokens"]): e for e in entries}
    rows = []
    for kind, rank in dict.fromkeys((entry["kind"], entry["rank"]) for entry in ordered(entries)):
        cells = [found.get((kind, rank, number)) for number in tokens]
        parameters = next(cell["parameters"] for cell in cells if cell)
        values = [mebibytes(cell, measure, kind) for cell in cells for measure in ("peak", "saved")]
        rows.append([subjects.LABELS[kind], rank or "", f"{parameters / MIB:.3f}", *values])
    head = [f"{measure}, {number} tokens" for number in tokens for measure in ("peak", "saved")]
    return table(["contender", "rank", "parameters", *head], rows)


def mebibytes(cell: dict[str, Any] | None, measure: str, kind: str) -> str:
    """The difference from the floor, or the floor's own number."""
    if cell is None:
        return ""
    if kind == "floor":
        return f"({cell[measure] / MIB:.1f})"
    return f"{cell[f'{measure}_above_floor'] / MIB:+.2f}"


def unseen(entries: Sequence[dict[str, Any]]) -> str:
    """What is held after the forward without being saved, beyond the floor's, at most."""
    floors = {e["tokens"]: e["held"] - e["saved"] for e in entries if e["kind"] == "floor"}
    most: dict[str, int] = {}
    for e in entries:
        beyond = e["held"] - e["saved"] - floors[e["tokens"]]
        most[e["kind"]] = max(most.get(e["kind"], 0), beyond)
    listed = ", ".join(
        f"{subjects.LABELS[kind]} {size / MIB:.2f}"
        for kind, size in most.items()
        if kind != "floor"
    )
    return f"Held after the forward and not saved, beyond the floor's, at most: {listed} MiB."


def main() -> None:
    """Count all cells and write the tables."""
    options = arguments(__doc__, repetitions=1)
    entries = fill(QUICK_CELLS if options.quick else CELLS, measure_cell, Progress())
    parts = ["Memory of a training step in MiB above the floor; in brackets the floor's own."]
    parts += sections(entries, lambda own: [table_of(own), unseen(own)])
    write(__file__, parts, {"cells": entries}, quick=options.quick)


if __name__ == "__main__":
    main()
