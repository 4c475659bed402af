"""The tests of the PEFT method use the models and helpers of the nn tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "nn"))
