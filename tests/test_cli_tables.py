"""What the command line prints: tables at any width, help, completion."""

import shutil
import subprocess
import sys

import pytest
from transformers import LlamaConfig

import lortalib
from lortalib.cli import main

COMMANDS = (
    "info", "plan", "sites", "check", "verify", "compare", "merge", "export-lora", "from-lora", "convert",
    "compress", "completion",
)  # fmt: skip


@pytest.fixture(autouse=True)
def piped(monkeypatch):
    """Whatever terminal runs the tests: tables go into a pipe, unless a test says how wide a line is."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def model(tmp_path):
    """A folder with a configuration; no command that only counts needs more."""
    config = LlamaConfig(num_key_value_heads=8, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def shown(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_sites_are_as_compact_as_in_python(model, capsys):
    lines = shown(capsys, "sites", model).split("\n")
    found = [line.split() for line in lines if line]
    table = str(lortalib.nn.sites(lortalib.nn.door.meta_model(LlamaConfig(num_key_value_heads=8))))
    expected = [line.replace("layers.0.", "model.layers.0.").split() for line in table.split("\n")]
    assert found == expected
    assert len(shown(capsys, "sites", model, "--all").split("\n")) > 128


@pytest.mark.parametrize(
    "command", [["sites"], ["plan"], ["plan", "--numbers", "20,000"], ["sites", "--all"]]
)
@pytest.mark.parametrize("width", [40, 80])
def test_no_line_is_longer_than_the_terminal(command, width, model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    out = shown(capsys, command[0], model, *command[1:])
    assert max(map(len, out.split("\n"))) <= width
    if width == 40:
        assert "\n\n" in out  # one record below the other


def test_a_pipe_gets_whole_lines(model, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    out = shown(capsys, "sites", model, "--all")
    heads, first = out.split("\n")[:2]
    assert heads.split()[:4] == ["stack", "layer", "role", "module"]
    assert first.endswith("reads the residual stream of width 4,096".replace(",", ""))


def test_figures_are_for_people(model, capsys):
    out = shown(capsys, "plan", model, "--rank", "64", "--decomposition", "lora")
    assert "67,108,864" in out
    assert "262,144" in out  # KiB
    assert "e+" not in out


def test_lists_are_written_with_commas_or_blanks(model, capsys):
    commas = shown(capsys, "plan", model, "--rank", "2,4", "--decomposition", "cp,tt")
    blanks = shown(capsys, "plan", model, "--rank", "2", "4", "--decomposition", "cp", "tt")
    assert commas == blanks
    line = "in r, head out r, layer matrix r"
    assert line in shown(capsys, "plan", model, "--decomposition", line, "cp,tt", "--rank", "2")


def test_numbers_gives_the_ranks_of_every_format(model, capsys):
    out = shown(capsys, "plan", model, "--numbers", "50,000")
    rows = {line.split()[0]: line for line in out.split("\n") if line}
    assert {"cp", "tt", "indscal", "lora", "uni_lora"} < set(rows)
    assert "has 1,048,576 trainable parameters at rank 1" in rows["lora"]
    only = shown(capsys, "plan", model, "--numbers", "50_000", "--decomposition", "cp,lora")
    assert "lora" in only
    assert "tucker" not in only


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_a_budget_that_is_none(number, model, capsys):
    with pytest.raises(SystemExit) as left:
        main(["plan", model, f"--numbers={number}"])
    assert left.value.code == 2
    assert "--numbers" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_text_and_a_default_for_every_option_and_examples(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert f"examples:\n  lortalib {command} " in text
    options = text.partition("options:\n")[2].partition("\n\n")[0].split("\n  -")[1:]
    assert len(options) >= 1
    for option in options:
        assert "(default: " in option, option


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_are_read_by_the_parser(command, capsys, monkeypatch):
    import shlex

    from lortalib.cli._parser import make_parser

    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out.partition("examples:\n")[2]
    for line in filter(None, text.split("\n")):
        words = shlex.split(line.partition(" >>")[0])
        assert words[0] == "lortalib"
        assert make_parser().parse_args(words[1:]).command


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["lortalib", "co"], {"compare", "compress", "convert", "completion"}),
        (["lortalib", "plan", "m", "--n"], {"--numbers"}),
        (
            ["lortalib", "verify", "--t"],
            {"--trust-remote-code", "--tolerance", "--task", "--token"},
        ),
        (["lortalib", "serve", "--ad"], {"--adapter", "--add-from"}),
        (["lortalib", "--v"], {"--version"}),
    ],
)
def test_bash_completes_commands_and_options(typed, offered, capsys, tmp_path):
    script = tmp_path / "completion.bash"
    script.write_text(shown(capsys, "completion"))
    words = " ".join(f"'{word}'" for word in typed)
    code = (
        f"source {script}; COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _lortalib; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered


def test_nothing_but_the_library_is_needed(model, monkeypatch, capsys):
    """Without tqdm, which only draws progress, tables are the same."""
    expected = shown(capsys, "sites", model)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert shown(capsys, "sites", model) == expected
