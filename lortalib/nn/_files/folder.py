"""Writes the files of a folder aside and then puts them in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

TENSORS = "adapter.safetensors"


DESCRIPTION = "adapter.json"


class AdapterFileError(ValueError):
    """A folder that holds no sound adapter, or one that does not fit the model."""


def write_tensors(tensors: Mapping[str, Tensor], file: Path, **metadata: str) -> None:
    """A safetensors file that others may read where they may read any new file of this process."""
    file.touch()
    mode = file.stat().st_mode
    save_file(dict(tensors), file, metadata={"format": "pt", **metadata})
    file.chmod(mode)  # safetensors leaves it to the owner alone


def _replace_both(aside: Path, folder: Path) -> None:
    """Put both new files in place; if one cannot be, the old ones are there again."""
    kept: list[str] = []
    try:
        for file in (TENSORS, DESCRIPTION):
            if (folder / file).exists():
                shutil.copy2(folder / file, aside / f"old-{file}")
                kept.append(file)
        for file in (TENSORS, DESCRIPTION):
            os.replace(aside / file, folder / file)
    except OSError:
        for file in kept:
            shutil.copy2(aside / f"old-{file}", folder / file)
        raise
