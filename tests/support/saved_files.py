"""What the tests of files do with the file of an adapter: read its parts, and write it changed."""

import json

from safetensors import safe_open

from lortalib.nn._files.saved import write_saved
from lortalib.nn._files.tensors import open_tensors

FILE = "adapter.safetensors"


def description(folder):
    """The description in the file, by safetensors' own reader."""
    with safe_open(folder / FILE, framework="pt") as file:
        return json.loads(file.metadata()["lortalib"])


def tensors(folder):
    """The tensors in the file, by safetensors' own reader."""
    with safe_open(folder / FILE, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def edit(folder, change=lambda value: None, numbers=lambda tensors: None, text=None):
    """Write the file again as if it was saved after the changes: its digest is right."""
    with open_tensors(folder / FILE) as file:
        values = file.read()
        value = json.loads(file.metadata["lortalib"])
    change(value)
    numbers(values)
    text = json.dumps(value) if text is None else text
    with (folder / FILE).open("wb") as file:
        write_saved(file, text, values)


def stops(function, calls, behind, error):
    """The function, but it stops after so many calls: before its work, or behind it."""
    count = iter(range(10**6))

    def call(*args, **kwargs):
        now = next(count) == calls
        if now and not behind:
            raise error("no space left on device")
        result = function(*args, **kwargs)
        if now:
            raise error("no space left on device")
        return result

    return call
