"""The real models of the examples, the usual tiny one, and what no file of tests may leave behind."""

import sys

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


@pytest.fixture(scope="module", autouse=True)
def no_checkpoint_is_left():
    """The tests of a file leave no graph behind; one would put guards on the models of all later tests."""
    yield
    if "torch.utils.checkpoint" in sys.modules:
        from lortalib._torch import live_checkpoints

        assert live_checkpoints() == []


@pytest.fixture
def llama():
    """A tiny Llama with four query heads and two key/value heads."""
    from models import FAMILIES  # not above: the tests of networks need no transformers

    return FAMILIES["Llama"].model("ForCausalLM")


@pytest.fixture
def inputs():
    """Token ids for it."""
    from models import words

    return words()
