"""The benchmark's own modules, so that the tests capture graphs and make models as it does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

#: Importing these makes a device for the whole process; test_pretended.py does so in one of its own.
collect_ignore = ["pretended.py", "pretended_checks.py", "pretended_cuda.py"]
