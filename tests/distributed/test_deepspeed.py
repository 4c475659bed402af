"""DeepSpeed ZeRO-3 trains the factors that one process reaches; elsewhere it has to gather them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapted import close, same_bits
from life_worker import base, logits

import lortalib

WORKER = Path(__file__).with_name("zero_worker.py")


@pytest.fixture(scope="module", params=["cp", "indscal"])
def lived(request, tmp_path_factory):
    """What each of two processes found, and their folder."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(WORKER), str(folder), request.param],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [torch.load(folder / f"found-{rank}") for rank in range(2)]


def test_two_processes_reach_what_one_reaches(lived):
    _, found = lived
    for each in found:
        for name, alone in each["alone"].items():
            assert close(each["factors"][name], alone, 1e-5)


def test_what_needs_whole_factors_is_refused_elsewhere_and_merging_always(lived):
    _, found = lived
    for each in found:
        assert all("deepspeed.zero.GatheredParameters" in message for message in each["outside"])
        assert not each["left"]
        assert "is divided by DeepSpeed ZeRO-3" in each["merging"]


def test_disabled_it_is_the_base(lived):
    _, found = lived
    for each in found:
        assert close(each["disabled"], logits(base()), 1e-6)


def test_what_was_written_is_what_was_trained(lived):
    folder, found = lived
    for rank, each in enumerate(found):
        model = base()
        loaded = lortalib.nn.load(model, folder / str(rank) / "own")
        factors = dict(loaded.networks.named_parameters())
        assert all(same_bits(factors[name].detach(), v) for name, v in each["factors"].items())
        assert close(logits(model), each["trained"], 1e-5)
        again = base()
        lortalib.nn.load_lora(again, folder / str(rank) / "lora")
        assert close(logits(again), each["trained"], 1e-5)
