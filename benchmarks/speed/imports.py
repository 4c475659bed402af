"""What an import of the library costs beside one of torch, each in a fresh process.

python benchmarks/speed/imports.py   writes imports.md beside it
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import subprocess
import sys
from pathlib import Path

CASES = {
    "`import torch`": "import torch",
    "`import lortalib`": "import lortalib",
    "`import lortalib.decomp`": "import lortalib.decomp",
    "`import lortalib.nn`": "import lortalib.nn",
    "`from transformers import BertModel`": "from transformers import BertModel",
}
ROUNDS = 5
#: As installed: with the bytecode that the first import leaves.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def seconds(code: str) -> float:
    """Processor time of a fresh process, which other work on the machine hardly changes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=ENVIRONMENT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure all cases in random order and write the table."""
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for code in CASES.values():
        seconds(code)
    for _ in range(ROUNDS):
        for name in random.sample(list(CASES), len(CASES)):
            found[name].append(seconds(CASES[name]))
    torch = statistics.median(found["`import torch`"])
    lines = ["| a fresh process with | processor seconds | `import torch` = 1 |", "|---|---:|---:|"]
    for name, times in found.items():
        middle = statistics.median(times)
        lines.append(f"| {name} | {middle:.2f} | {middle / torch:.2f} |")
    text = f"Medians of {ROUNDS} processes, in random order.\n\n" + "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
