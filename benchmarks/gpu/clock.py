"""Times work on a device: in turn, by the device's own clock, eager or as a CUDA graph."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Work = Callable[[], object]


def wait(device: torch.device) -> None:
    """Let the device end all work that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Work, device: torch.device, repeats: int) -> float:
    """Time of one run of the work, as the mean over runs that follow each other without a pause."""
    wait(device)
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - begin) * 1e3 / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        work()
    last.record()
    wait(device)
    return first.elapsed_time(last) / repeats


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


def as_graph(work: Work) -> Work:
    """The work captured as a CUDA graph; running it replays the kernels without Python.

    Args:
        work: reads and writes the same tensors in every run.

    Raises:
        RuntimeError: the work waits for the device, so it cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # caches and workspaces are there before the capture
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
