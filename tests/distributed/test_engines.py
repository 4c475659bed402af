"""Two processes on the CPU reach the factors that one process reaches."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")
ENGINES = {
    "ddp": ["ddp"],
    "ddp, static": ["ddp", "--static"],
    "ddp, checkpoints": ["ddp", "--checkpoint", "other"],
    "ddp, static, reentrant checkpoints": ["ddp", "--static", "--checkpoint", "reentrant"],
    "ddp, accumulation": ["ddp", "--accumulate", "2"],
    "fsdp": ["fsdp"],
    "fsdp, checkpoints": ["fsdp", "--checkpoint", "other"],
    "fsdp, accumulation": ["fsdp", "--accumulate", "2"],
    "accelerate": ["accelerate"],
}
DOORS = ["nn", "peft", "tasks", "tasks apart"]
QUICK = {("ddp", "nn"), ("fsdp", "nn"), ("fsdp", "tasks")}


def run(command, out, arguments):
    engine, *more = arguments
    done = subprocess.run(
        [*command, str(WORKER), engine, str(out), *more],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return a function that says what a single process reaches through a door."""
    folder = tmp_path_factory.mktemp("alone")

    @cache
    def reached(door):
        return run([sys.executable], folder / door, ["single", "--door", door])

    return reached


@pytest.mark.parametrize(
    ("engine", "door"),
    [
        pytest.param(engine, door, marks=[pytest.mark.slow] * ((engine, door) not in QUICK))
        for engine in ENGINES
        for door in DOORS
    ],
)
def test_two_processes_train_as_one(engine, door, alone, tmp_path):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]

    found = run(torchrun, tmp_path / "out", [*ENGINES[engine], "--door", door])
    expected = alone(door)
    assert list(found) == list(expected)
    for name, factor in found.items():
        assert torch.allclose(factor, expected[name], atol=2e-5, rtol=1e-3), name
        assert factor.abs().sum() > 0
