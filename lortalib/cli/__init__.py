"""Runs the command line: ``lortalib COMMAND``, such as info, plan, check, verify, compare and merge.

Example:
    >>> main(["info", "no-such-folder", "--json"]) # doctest: +ELLIPSIS
    {"error": "no adapter.safetensors in no-such-folder; ...
    1
"""

from ._main import main

__all__ = ["main"]
