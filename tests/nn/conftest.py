"""Fixtures of the nn tests: the model that most of them use, and its input."""

import pytest
from models import FAMILIES


@pytest.fixture
def llama():
    """A tiny Llama with four query heads and two key/value heads."""
    return FAMILIES["Llama"].model("ForCausalLM")


@pytest.fixture
def inputs():
    return FAMILIES["Llama"].inputs()
