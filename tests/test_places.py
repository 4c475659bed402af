"""Whoever takes a folder or a name on the hub takes its revision, a token and a folder in it."""

import inspect

import pytest

from lortalib import decomp, nn, peft, plot
from lortalib.cli._completion import subcommands
from lortalib.cli._parser import make_parser
from lortalib.nn import door

PLACE = {"revision", "token", "subfolder"}
#: Parameters that take a folder or a name on the hub.
FOLDERS = {"folder", "folders", "source", "other_task"}
#: What writes a folder.
WRITERS = {"export_gguf", "export_lora", "save", "save_pretrained"}


def functions():
    """Public functions, and public methods of public classes, by their names."""
    for module in (decomp, nn, door, peft, plot):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value) and value.__module__.startswith("lortalib"):
                for own, method in inspect.getmembers(value, inspect.isfunction):
                    if not own.startswith("_") and method.__module__.startswith("lortalib"):
                        yield f"{module.__name__}.{name}.{own}", method


TAKING = {
    full: function
    for full, function in functions()
    if full.rpartition(".")[2] not in WRITERS
    and FOLDERS & {*inspect.signature(function).parameters}
}


def test_those_that_are_known_are_looked_at():
    assert {name.removeprefix("lortalib.nn.") for name in TAKING} >= {
        "load", "read", "read_description", "load_lora", "convert", "compress", "bank_like", "Bank.add",
        "Bank.load", "door.compare_updates", "door.lora_config",
    }  # fmt: skip


@pytest.mark.parametrize("name", TAKING)
def test_a_function_that_takes_a_folder_takes_its_place(name):
    function = TAKING[name]
    assert {*inspect.signature(function).parameters} >= PLACE
    for word in PLACE:
        assert f"{word}:" in function.__doc__ or f", {word}" in function.__doc__


COMMANDS = subcommands(make_parser())
MODEL = {"--model-revision", "--model-subfolder", "--token"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_takes_a_folder_takes_its_place(name):
    actions = COMMANDS[name]._actions
    options = {option for action in actions for option in action.option_strings}
    named = {action.dest for action in actions if not action.option_strings}
    reads = {"folder", "a", "b", "lora"} & named or {"--bank", "--adapter"} & options
    takes_model = "model" in named or "--model" in options
    if reads or takes_model:
        assert options >= {f"--{word}" for word in PLACE}
    if reads and takes_model:
        assert options >= MODEL
