"""How do fits and rounding of `lortalib.decomp` compare with TensorLy's, on the same tensors?

A tensor of 12 layers, 4 matrices, 96 inputs and 64 outputs in float64 (2.25 MiB): a network of the format
with 10 % of noise. Both sides run the same number of sweeps (of iterations, of alternating least squares)
from a start of their own, or fewer where the error falls no more. lortalib's own algorithm is measured,
also where `fit` would call TensorLy's. Masked: three entries in ten are missing. Rounding: the sum of three
trains of rank 8 to rank 8; TensorLy has no rounding, so there the dense tensor is decomposed again.

Measured: seconds; the largest number of bytes of tensors alive at once, without the target; the relative
error (with a mask, over the missing entries, before noise).

    python benchmarks/speed/decomp.py   writes decomp.md and .json beside it, in 2 minutes
    python benchmarks/speed/decomp.py --quick   writes runs/decomp-quick.md and .json
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorly as tl
import torch
from measure import MIB, Progress, Timed, arguments, interleave, medians, table, write
from memory import Alive
from tensorly.decomposition import parafac, tensor_ring_als, tensor_train, tucker
from torch import Tensor

from lortalib import decomp

SHAPE = decomp.Shape({"layer": 12, "matrix": 4, "in": 96, "out": 64})
NOISE, MISSING, SWEEPS = 0.1, 0.3, 20


class Task(NamedTuple):
    """Two ways to the same end.

    Attributes:
        name: what is done.
        ours: lortalib's way; returns the approximation.
        theirs: TensorLy's way; returns a dense tensor.
        error: from a dense tensor to the relative error.
    """

    name: str
    ours: Callable[[], decomp.Network]
    theirs: Callable[[], Tensor]
    error: Callable[[Tensor], float]


def noisy(name: str, rank: Any) -> tuple[Tensor, Tensor]:
    """A tensor of a format, and the same with noise."""
    source = torch.Generator().manual_seed(0)
    net = decomp.network(name, SHAPE, rank, init="normal", generator=source, dtype=torch.float64)
    pure = net.dense().detach()
    extra = torch.randn(pure.shape, generator=source, dtype=torch.float64)
    return pure, pure + NOISE * pure.norm() / extra.norm() * extra


def relative(target: Tensor, at: Tensor | None = None) -> Callable[[Tensor], float]:
    """The relative distance to a target, over some entries."""
    entries = torch.ones_like(target) if at is None else at.double()
    size = (target * entries).norm()
    return lambda found: (((found - target) * entries).norm() / size).item()


def fit_task(label: str, name: str, rank: Any, start: str, theirs: Callable[[Tensor], Any]) -> Task:
    """Fit a format to the tensor of that format with noise."""
    _, dense = noisy(name, rank)

    def ours() -> decomp.Network:
        found = decomp.fit(
            dense, name, rank, modes=SHAPE.modes, start=start, sweeps=SWEEPS, tolerance=0
        )
        return found.network

    return Task(label, ours, lambda: theirs(dense).to_tensor(), relative(dense))


def masked_task() -> Task:
    """Fit CP to the entries that are known."""
    pure, dense = noisy("cp", 8)
    mask = torch.rand(dense.shape, generator=torch.Generator().manual_seed(1)) >= MISSING

    def ours() -> decomp.Network:
        found = decomp.fit(
            dense, "cp", 8, modes=SHAPE.modes, mask=mask, start="random", sweeps=SWEEPS, tolerance=0
        )
        return found.network

    def theirs() -> Tensor:
        weights = mask.double()
        options = {"n_iter_max": SWEEPS, "tol": 0, "init": "random", "random_state": 0}
        return parafac(dense * weights, 8, mask=weights, **options).to_tensor()

    return Task("CP, rank 8, masked", ours, theirs, relative(pure, ~mask))


def round_task() -> Task:
    """Round a sum of trains to the rank of one."""
    source = torch.Generator().manual_seed(0)
    options = {"init": "normal", "generator": source, "dtype": torch.float64}
    total = decomp.direct_sum([decomp.tt(SHAPE, 8, **options) for _ in range(3)], [1, 0.1, 0.01])
    order = [SHAPE.modes.index(term.legs[0]) for term in total.legs.terms]
    back = [order.index(axis) for axis in range(len(order))]
    ranks = [1, 8, 8, 8, 1]

    def theirs() -> Tensor:
        train = total.dense().detach().permute(order).contiguous()
        return tensor_train(train, ranks).to_tensor().permute(back)

    return Task(
        "train, rank 24 to 8",
        lambda: decomp.round(total, rank=8).network,
        theirs,
        relative(total.dense().detach()),
    )


def tasks() -> list[Task]:
    """All tasks, with equal sweeps on both sides."""
    options = {"n_iter_max": SWEEPS, "tol": 0, "random_state": 0}
    per_axis = [6, 4, 8, 8]  # of layer, matrix, in, out

    return [
        fit_task(
            "CP, rank 8", "cp", 8, "random", lambda x: parafac(x, 8, init="random", **options)
        ),
        fit_task(
            "Tucker, ranks 6 4 8 8",
            "tucker",
            per_axis,
            "svd",
            lambda x: tucker(x, per_axis, **options),
        ),
        fit_task("train, rank 8", "in a, layer a b, matrix b c, out c", 8, "svd", train_of),
        fit_task(
            "ring, rank 3",
            "ring",
            3,
            "random",
            lambda x: tensor_ring_als(x, [3] * 5, n_iter_max=SWEEPS, tol=0, random_state=0),
        ),
        masked_task(),
        round_task(),
    ]


class _Permuted(NamedTuple):
    """A train over permuted axes, with the axes of the tensor."""

    train: Any
    back: list[int]

    def to_tensor(self) -> Tensor:
        return self.train.to_tensor().permute(self.back)


def train_of(x: Tensor) -> _Permuted:
    """TensorLy's train through in, layer, matrix, out."""
    order = [SHAPE.modes.index(mode) for mode in ("in", "layer", "matrix", "out")]
    back = [order.index(axis) for axis in range(4)]
    return _Permuted(tensor_train(x.permute(order).contiguous(), [1, 8, 8, 8, 1]), back)


def peak(run: Callable[[], object]) -> int:
    """The largest number of bytes of tensors alive at once."""
    gc.collect()
    with torch.no_grad(), Alive([]) as alive:
        run()
    return alive.peak


def main() -> None:
    """Measure every task and write the table."""
    chosen = arguments(__doc__, repetitions=5, quick=1)
    warnings.simplefilter("ignore")  # ranks of short modes are cut
    tl.set_backend("pytorch")
    progress, rows, entries = Progress(), [], []
    for task in tasks():
        runs = {"lortalib": Timed(task.ours), "TensorLy": Timed(task.theirs)}
        seconds = medians(interleave(runs, chosen.repetitions))
        found = {"lortalib": task.ours().dense().detach(), "TensorLy": task.theirs()}
        for name, run in (("lortalib", task.ours), ("TensorLy", task.theirs)):
            bytes_, error = peak(run), task.error(found[name])
            entry = {"task": task.name, "library": name, "seconds": seconds[name]}
            entries.append({**entry, "peak": bytes_, "error": error})
            rows.append(
                [task.name, name, f"{seconds[name]:.3f}", f"{bytes_ / MIB:.2f}", f"{error:.4f}"]
            )
        progress.say(task.name)
    head = ("task", "library", "seconds", "MiB", "error")
    parts = [
        f"Medians of {chosen.repetitions} rounds; {SWEEPS} sweeps; a tensor of 2.25 MiB in float64.",
        table(head, rows),
    ]
    write(__file__, parts, {"entries": entries}, quick=chosen.quick)


if __name__ == "__main__":
    main()
