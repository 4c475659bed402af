"""What all tests and the examples in docstrings share: no network, one thread, random numbers from a seed."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")  # plots open no window
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only wait for each other

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

if Version(version("transformers")) < Version("5.18"):  # lortalib.serve says so itself
    collect_ignore_glob = ["lortalib/serve/*", "tests/test_serve*.py", "tests/test_cli_serve.py"]


def pytest_collection_finish():
    """Hide what is imported by now from the garbage collector: hundreds of tests collect garbage, and need
    not look at a million objects that stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Seed torch before each test, so that none depends on those that ran before it.

    Tests must pass with any seed: LORTALIB_SEED tries another one.
    """
    torch.manual_seed(int(os.environ.get("LORTALIB_SEED", "0")))
