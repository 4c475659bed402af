"""The command line: ``lortalib info``, ``plan``, ``sites``, ``check``, ``merge``, ``export-lora``.

Example:
    >>> main(["plan", "no-such-folder", "--json"])
    1
"""

from ._main import main

__all__ = ["main"]
