"""How do fits and rounding of `lortalib.decomp` compare with TensorLy, tntorch and torchTT?

Dense tensors of three shapes in float64: a CP of the rank with 10 % of noise. CP: all run the same
number of sweeps of alternating least squares from a random start of their own, or fewer where the error
falls no more; lortalib's own algorithm is measured, also where `fit` would call TensorLy's. Tucker and
trains: TensorLy iterates HOOI for Tucker; tntorch's Tucker and all rivals' trains are one truncated
pass, as lortalib's start is, which is then improved by sweeps until the error falls by less than 1e-6.
Where lortalib's `fit` as it comes calls TensorLy, that is one more row. Masked: three entries in ten are
missing; the error is over them, before noise. Rounding: the sum of three trains to the rank of one;
TensorLy has no rounding, so there the dense tensor is decomposed again.

Measured: seconds; the largest number of bytes of tensors alive at once, without the target; the relative
error. A library that does not import is left out and named.

    python benchmarks/speed/decomp.py   writes decomp.md and .json beside it, in 8 minutes
    python benchmarks/speed/decomp.py --quick   writes runs/decomp-quick.md and .json
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import tensorly as tl
import torch
from measure import MIB, Progress, Timed, arguments, interleave, medians, table, write
from memory import Alive
from tensorly.decomposition import parafac, tensor_ring_als, tensor_train, tucker
from torch import Tensor

from lortalib import decomp

SHAPES = {
    "20³": {"a": 20, "b": 20, "c": 20},
    "100³": {"a": 100, "b": 100, "c": 100},
    "adapter 8 x 8 x 4 x 256 x 16": {"layer": 8, "head": 8, "matrix": 4, "in": 256, "out": 16},
}
RANKS = (5, 20)
NOISE, MISSING, SWEEPS, TOLERANCE = 0.1, 0.3, 20, 1e-6

Run = Callable[[], Any]


class Task(NamedTuple):
    """Several ways to the same end.

    Attributes:
        name: what is done.
        runs: by library, its way; returns a network, or a decomposition of the library.
        dense: from what a run returns to the dense tensor.
        error: from a dense tensor to the relative error.
    """

    name: str
    runs: dict[str, Run]
    dense: Callable[[Any], Tensor]
    error: Callable[[Tensor], float]


def library(name: str) -> Any:
    """Import a rival; None if it is not installed or does not import."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        return None


TNTORCH, TORCHTT = library("tntorch"), library("torchtt")


def noisy(sizes: dict[str, int], rank: int) -> tuple[Tensor, Tensor]:
    """A tensor of CP, and the same with noise."""
    source = torch.Generator().manual_seed(0)
    net = decomp.cp(sizes, rank, init="normal", generator=source, dtype=torch.float64)
    pure = net.dense().detach()
    extra = torch.randn(pure.shape, generator=source, dtype=torch.float64)
    return pure, pure + NOISE * pure.norm() / extra.norm() * extra


def relative(target: Tensor, at: Tensor | None = None) -> Callable[[Tensor], float]:
    """The relative distance to a target, over some entries."""
    entries = torch.ones_like(target) if at is None else at.double()
    size = (target * entries).norm()
    return lambda found: (((found - target) * entries).norm() / size).item()


def to_dense(found: Any, back: list[int] | None = None) -> Tensor:
    """The dense tensor of what any of the libraries returns; a rival's train has permuted axes."""
    if isinstance(found, decomp.Fit | decomp.Rounding):
        return found.network.dense().detach()
    ways = ("to_tensor", "full", "torch")
    dense: Tensor = next(getattr(found, way)() for way in ways if hasattr(found, way))
    return dense if back is None else dense.permute(back)


def quietly(run: Run) -> Run:
    """The same without what a library prints."""

    def silent() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return run()

    return silent


def cp_task(label: str, sizes: dict[str, int], rank: int) -> Task:
    """CP by alternating least squares."""
    dense = noisy(sizes, rank)[1]
    own = {"modes": tuple(sizes), "sweeps": SWEEPS, "tolerance": 0}
    theirs = {"n_iter_max": SWEEPS, "tol": 0, "init": "random", "random_state": 0}
    runs = {
        "lortalib": lambda: decomp.fit(dense, "cp", rank, start="random", **own),
        "TensorLy": lambda: parafac(dense, rank, **theirs),
    }
    if TNTORCH:
        runs["tntorch"] = quietly(
            lambda: TNTORCH.Tensor(dense, ranks_cp=rank, max_iter=SWEEPS, tol=0)
        )
    return Task(f"CP, rank {rank}, {label}", runs, to_dense, relative(dense))


def tucker_task(label: str, sizes: dict[str, int], rank: int) -> Task:
    """Tucker of equal ranks, cut to the modes."""
    dense = noisy(sizes, rank)[1]
    ranks = [min(rank, size) for size in sizes.values()]
    own = {"modes": tuple(sizes), "start": "svd", "tolerance": TOLERANCE}
    runs = {
        "lortalib": lambda: decomp.fit(dense, "tucker", ranks, **own),
        "TensorLy": lambda: tucker(dense, ranks, n_iter_max=SWEEPS, tol=TOLERANCE),
    }
    if TNTORCH:
        runs["tntorch, one pass"] = lambda: TNTORCH.Tensor(dense, ranks_tucker=ranks)
    return Task(f"Tucker, rank {rank}, {label}", runs, to_dense, relative(dense))


def train_task(label: str, sizes: dict[str, int], rank: int) -> Task:
    """A tensor train."""
    dense, modes = noisy(sizes, rank)[1], tuple(sizes)
    net = decomp.tt(sizes, rank, device="meta")
    order = [modes.index(term.legs[0]) for term in net.legs.terms]
    train, ranks = dense.permute(order).contiguous(), [1, *net.ranks.values(), 1]
    runs: dict[str, Run] = {
        "lortalib": lambda: decomp.fit(
            dense, "tt", rank, modes=modes, start="svd", tolerance=TOLERANCE
        ),
        "lortalib, calling TensorLy": lambda: decomp.fit(dense, "tt", rank, modes=modes),
        "TensorLy, one pass": lambda: tensor_train(train, ranks),
    }
    if TNTORCH:
        runs["tntorch, one pass"] = lambda: TNTORCH.Tensor(train, ranks_tt=ranks[1:-1])
    if TORCHTT:
        runs["torchTT, one pass"] = lambda: TORCHTT.TT(train, eps=1e-14, rmax=ranks)
    back = [order.index(axis) for axis in range(len(order))]
    return Task(f"train, rank {rank}, {label}", runs, in_order(back), relative(dense))


def in_order(back: list[int]) -> Callable[[Any], Tensor]:
    """`to_dense`, where rivals have the axes of the train."""
    ours = (decomp.Fit, decomp.Rounding)
    return lambda found: to_dense(found, None if isinstance(found, ours) else back)


def ring_task() -> Task:
    """A tensor ring."""
    sizes = {"layer": 12, "matrix": 4, "in": 96, "out": 64}
    dense = noisy(sizes, 5)[1]
    own = {"modes": tuple(sizes), "start": "random", "sweeps": SWEEPS, "tolerance": 0}
    theirs = {"n_iter_max": SWEEPS, "tol": 0, "random_state": 0}
    runs = {
        "lortalib": lambda: decomp.fit(dense, "ring", 3, **own),
        "TensorLy": lambda: tensor_ring_als(dense, [3] * 5, **theirs),
    }
    return Task("ring, rank 3, 12 x 4 x 96 x 64", runs, to_dense, relative(dense))


def masked_task(label: str, sizes: dict[str, int]) -> Task:
    """CP of the entries that are known."""
    pure, dense = noisy(sizes, 5)
    mask = torch.rand(dense.shape, generator=torch.Generator().manual_seed(1)) >= MISSING
    own = {"modes": tuple(sizes), "start": "random", "sweeps": SWEEPS, "tolerance": 0}
    theirs = {"n_iter_max": SWEEPS, "tol": 0, "init": "random", "random_state": 0}
    weights = mask.double()
    runs = {
        "lortalib": lambda: decomp.fit(dense, "cp", 5, mask=mask, **own),
        "TensorLy": lambda: parafac(dense * weights, 5, mask=weights, **theirs),
    }
    return Task(f"CP, rank 5, masked, {label}", runs, to_dense, relative(pure, ~mask))


def round_task(label: str, sizes: dict[str, int], rank: int) -> Task:
    """Round a sum of trains to the rank of one."""
    source = torch.Generator().manual_seed(0)
    make = partial(decomp.tt, sizes, rank, init="normal", generator=source, dtype=torch.float64)
    total = decomp.direct_sum([make() for _ in range(3)], [1, 0.1, 0.01])
    cores = [tensor.detach() for tensor in total.tensors]
    cores = [cores[0][None], *cores[1:-1], cores[-1].mT.unsqueeze(-1)]
    order = [tuple(sizes).index(term.legs[0]) for term in total.legs.terms]
    back = [order.index(axis) for axis in range(len(order))]
    cores[1:-1] = [core.movedim(0, 1) for core in cores[1:-1]]  # (left, mode, right)
    ranks = [1, *make().ranks.values(), 1]
    runs: dict[str, Run] = {"lortalib": lambda: decomp.round(total, rank=rank)}
    dense = total.dense().detach()
    train = dense.permute(order).contiguous()
    runs["TensorLy, of the dense tensor"] = lambda: tensor_train(train, ranks)
    if TNTORCH:
        runs["tntorch"] = lambda: TNTORCH.round_tt(
            TNTORCH.Tensor([core.clone() for core in cores]), eps=1e-14, rmax=ranks[1:-1]
        )
    if TORCHTT:
        runs["torchTT"] = lambda: TORCHTT.TT(cores).round(1e-14, ranks)
    return Task(
        f"rounding, rank {3 * rank} to {rank}, {label}", runs, in_order(back), relative(dense)
    )


def tasks() -> Iterator[Task]:
    """All tasks."""
    for make in (cp_task, tucker_task, train_task):
        for label, sizes in SHAPES.items():
            for rank in RANKS:
                yield make(label, sizes, rank)
    yield ring_task()
    for label, sizes in SHAPES.items():
        yield masked_task(label, sizes)
    yield round_task("100³", SHAPES["100³"], 8)
    yield round_task("eight modes of 6", {f"m{k}": 6 for k in range(8)}, 8)


def peak(run: Run) -> int:
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
        timed = {name: Timed(run) for name, run in task.runs.items()}
        seconds = medians(interleave(timed, chosen.repetitions, clock=time.process_time))
        for name, run in task.runs.items():
            bytes_, error = peak(run), task.error(task.dense(run()))
            entry = {"task": task.name, "library": name, "seconds": seconds[name]}
            entries.append({**entry, "peak": bytes_, "error": error})
            time_ = f"{1000 * seconds[name]:.1f}"
            rows.append([task.name, name, time_, f"{bytes_ / MIB:.2f}", f"{error:.4f}"])
        progress.say(task.name)
    missing = [name for name in ("tntorch", "torchtt") if library(name) is None]
    head = ("task", "library", "ms", "MiB", "error")
    parts = [
        f"Medians of {chosen.repetitions} rounds in one run, processor time; CP, ring and masked fits: "
        f"{SWEEPS} sweeps. "
        f"Not installed: {', '.join(missing) or 'none of the rivals that the script knows'}.",
        table(head, rows),
    ]
    write(__file__, parts, {"entries": entries}, quick=chosen.quick)


if __name__ == "__main__":
    main()
