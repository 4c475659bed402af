"""The benchmark's own modules, so that the tests capture graphs and make models as it does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
