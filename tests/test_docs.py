"""The code in README and on the documentation pages runs, and nothing public is left out of them."""

import ast
import importlib
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from lortalib import decomp

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts),
]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Pages that need a newer transformers than the lowest.
SINCE = {"serving.md": "5.18"}
SHAPE = {"layer": 12, "head": 12, "matrix": 4, "in": 768, "out": 64}


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    return re.findall(
        r"^```(?:python|\{picture\})\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S
    )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_code_of_a_page(page, tmp_path, monkeypatch, request):
    if Version(version("transformers")) < Version(SINCE.get(page.name, "5")):
        pytest.skip(f"the page needs transformers {SINCE[page.name]}")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for number, code in enumerate(blocks(page)):
        if MODEL in code:
            code = code.replace(MODEL, str(request.getfixturevalue("asset")("smollm2")))
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" not in target:
            file = target.partition("#")[0]
            assert not file or (page.parent / file).exists(), target


def test_the_readme_on_a_package_index_has_absolute_links_and_pictures(monkeypatch):
    markdown = pytest.importorskip("markdown_it")
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    from absolute_links import absolute

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "$$" not in text  # no index shows formulas
    page = (
        markdown.MarkdownIt("commonmark")
        .enable("table")
        .render(absolute(text, "https://host/owner/name", "v1"))
    )
    targets = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert "https://host/owner/name/raw/v1/docs/_static/gain.svg" in targets
    assert "https://host/owner/name/blob/v1/docs/quality.md" in targets
    assert [target for target in targets if not target.startswith("https://")] == []


def test_the_figures_at_the_top_are_those_of_the_study():
    study = (ROOT / "benchmarks/quality/quality.md").read_text(encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Install")[0]
    for method, size in (
        (r"\*\*lortalib stream INDSCAL r\d+\*\*", "20.1"),
        ("PEFT LoRA r1", "8.0"),
    ):
        rows = re.findall(rf"^\| {method} \| [\d,]+ \| 1/{size} .*?\| (\d+)% \|", study, re.M)
        one, two, three, four = rows[:4]  # of the first edition, in the order of the tasks
        assert f"{one}, {two}, {three} and {four} %" in text


@pytest.mark.parametrize("page", ["README.md", "docs/formats.md"])
def test_tables_of_formats_are_the_registry(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = dict(re.findall(r"^ *\| \[?`(\w+)`[^|]*\| `([^`]+)` \|", text, re.M))
    stream = {"layer": 12, "matrix": 4, "in": 768, "out": 768}
    shapes = {"metatt_41d": {"task": 3, **SHAPE}, "indscal": stream, "rescal": stream}
    lines = {n: str(form.legs(shapes.get(n, SHAPE))) for n, form in decomp.formats.items()}
    assert found == lines


def test_every_format_has_a_page():
    assert {page.stem for page in DOCS.glob("formats/*.md")} == set(decomp.formats)


@pytest.mark.parametrize("module", ["decomp", "nn", "peft", "serve", "plot", "cli"])
def test_every_public_name_is_in_the_reference(module):
    """Of methods and fields too the build of the documentation makes sure (docs/_ext/complete.py)."""
    text = (DOCS / "api" / f"{module}.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. (?:auto(?!module)\w+|data):: (\w+)", text, re.M)
    assert sorted(documented) == sorted(importlib.import_module(f"lortalib.{module}").__all__)


def texts_of(tree):
    """Every text in the code, with a blank for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else " " for part in node.values)
            yield "".join(parts)


def test_messages_under_troubleshooting_are_messages_of_the_library():
    sources = (ROOT / "lortalib").rglob("*.py")
    code = "\n".join(t for s in sources for t in texts_of(ast.parse(s.read_text(encoding="utf-8"))))
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    parts = page.split("\n## ")[2:]  # behind the first table, whose symptoms are no messages
    quoted = [message for row in re.findall(r"^\| (`.*?) \|", "\n".join(parts), re.M)
              for message in re.findall(r"`([^`]+)`", row)]  # fmt: skip
    assert len(quoted) > 15
    for message in quoted:
        for piece in re.split(r"\.\.\.|'x'|'default'|\bN\b|UnsupportedModelError:", message):
            assert piece.strip(" (),;") in code, message
