"""The functions of `torch.cuda` that the benchmark calls, for the pretended accelerator.

A capture does nothing but forbid what a capture on a GPU forbids: waiting for the device.
"""

import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from pretended import no_waiting

CARD = SimpleNamespace(name="Pretended 1", total_memory=2**33)


class Event:
    """A moment of the clock."""

    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class Stream:
    """A stream, of which there is only one."""

    def wait_stream(self, other):
        pass


class Graph:
    """A graph; counts how often it was replayed."""

    replays = 0

    def replay(self):
        Graph.replays += 1


def pretend_cuda(monkeypatch):
    """Put these in the place of torch's for one test."""
    capturing = []

    @contextmanager
    def capture(graph, pool=None):
        capturing.append(graph)
        try:
            with no_waiting():
                yield
        finally:
            capturing.pop()

    functions = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "is_current_stream_capturing": lambda: bool(capturing),
        "stream": lambda stream: nullcontext(),
        "current_stream": Stream,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 2**21,
        "max_memory_allocated": lambda device: 2**23,
        "graph_pool_handle": lambda: (0, 1),
        "get_device_properties": lambda device: CARD,
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
