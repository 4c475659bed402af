"""On a machine without a GPU the checks of `pretended_checks` run, in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

HERE = Path(__file__).parent
pytestmark = pytest.mark.gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
@pytest.mark.slow
def test_a_pretended_accelerator():
    command = [
        sys.executable, "-m", "pytest", HERE / "pretended_checks.py",
        "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "-rfE",
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
