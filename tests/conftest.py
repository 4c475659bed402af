"""What all tests share: no network, and the real models and data of the examples."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only wait for each other
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import assets
import pytest


@pytest.fixture(scope="session")
def asset():
    """A function from a loader's name to what it loads; skips where its package is missing."""

    def load(name):
        try:
            return getattr(assets, name)()
        except assets.MissingAsset as missing:
            pytest.skip(str(missing))

    return load
