"""Runs the command line: ``lortalib`` info, plan, sites, check, merge, export-lora, convert.

Example:
    >>> main(["info", "no-such-folder", "--json"]) # doctest: +ELLIPSIS
    {"error": "no adapter.safetensors in no-such-folder; ...
    1
"""

from ._main import main

__all__ = ["main"]
