"""Names the folder of one adapter among those of several."""

from __future__ import annotations

import re
from pathlib import Path


def own_folder(folder: Path, name: str) -> Path:
    """Return the folder of an adapter in a folder of several: it is called as the adapter.

    A name can come from a file, and be that of another place. Characters that separate folders are
    therefore written as ``%2F`` and the like.

    Args:
        folder: the folder of all of them.
        name: the name of the adapter.

    Example:
        >>> own_folder(Path("saved"), "ann").as_posix(), own_folder(Path("saved"), "/tmp/ann").as_posix()
        ('saved/ann', 'saved/%2Ftmp%2Fann')
    """
    return folder / re.sub(r"[%/\\:]", lambda found: f"%{ord(found[0]):02X}", name)
