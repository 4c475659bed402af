"""Lets the tests in here use what the tests of damage in tests/nn are made of."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "nn"))
