"""Times work on a device: in turn, by the device's own clock, eager or as a CUDA graph."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

#: Runs before a CUDA graph is captured: caches, workspaces and the optimiser's state are there then.
WARM_UP = 3


class Work(NamedTuple):
    """What is timed.

    Attributes:
        run: one run of it.
        rewind: brings back what runs use up, such as the room of a cache; called before every timing.
    """

    run: Callable[[], Any]
    rewind: Callable[[], object] = lambda: None


def wait(device: torch.device) -> None:
    """Let the device end all work that it was given."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def milliseconds(work: Work, device: torch.device, repeats: int) -> float:
    """Time of one run of the work, as the mean over runs that follow each other without a pause."""
    work.rewind()
    wait(device)
    if device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(repeats):
            work.run()
        return (time.perf_counter() - begin) * 1e3 / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        work.run()
    last.record()
    wait(device)
    total: float = first.elapsed_time(last)
    return total / repeats


def in_turn(
    works: Mapping[str, Work], device: torch.device, rounds: int, repeats: int, until: float
) -> dict[str, list[float]]:
    """Milliseconds of every work in every round; within a round the order is drawn at random.

    Args:
        works: by name; each has run before.
        device: where they run.
        rounds: how many rounds.
        repeats: runs of a work within a round.
        until: moment of `time.monotonic` after which no further round begins.
    """
    draw, found = random.Random(0), {name: list[float]() for name in works}
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for name in draw.sample([*works], len(works)):
            found[name].append(milliseconds(works[name], device, repeats))
    return found


def ratio(times: Mapping[str, list[float]], name: str, floor: str) -> float:
    """Median over the rounds of the ratio of two times of one round."""
    return statistics.median(a / b for a, b in zip(times[name], times[floor]))


def as_graph(work: Work, pool: Any = None) -> Work:
    """The work captured as a CUDA graph; a run of it replays the kernels without Python.

    The result of a run is the tensor that the captured run returned, with the new numbers.

    Args:
        work: reads and writes the same tensors in every run.
        pool: the memory of graphs that never run at once; what one of them leaves there, another may
            write over.

    Raises:
        RuntimeError: the work waits for the device, so it cannot be captured.
    """
    work.rewind()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work.run()

    def replay() -> Any:
        graph.replay()
        return result

    return Work(replay, work.rewind)
