"""The page of messages: none of the library's is missed, and none is left without what to try."""

import re
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
ROOT = Path(__file__).parents[1]
SOURCE = """
import warnings

def why(name):
    if name:
        return f"no {name} here"
    return "nothing here"

class Box:
    def open(self, key):
        if key is None:
            raise KeyError(f"no {key!r} " + f"in {self}")
        warnings.warn(f"slow: {key}", RuntimeWarning)
        warnings.warn("old")
        try:
            raise ValueError(why(key))
        except ValueError:
            raise
        raise key
"""


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs/_ext"))
    import messages

    return messages


@pytest.fixture
def library(page, monkeypatch, tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "box.py").write_text(SOURCE)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    return page


def test_texts_of_errors_and_warnings(library):
    found = [(m.text, m.kind, m.function) for m in library.messages()]
    assert found == [
        ("no … in …", "KeyError", "Box.open"),
        ("slow: …", "RuntimeWarning", "Box.open"),
        ("old", "UserWarning", "Box.open"),
        ("nothing here", "ValueError", "Box.open"),
        ("no … here", "ValueError", "Box.open"),
    ]


def test_parts_are_files_by_pattern(library):
    assert len(library.of_part("other/* room/*")) == 5
    assert library.of_part("*") == []


def test_a_remedy_goes_with_a_message(library):
    found = library.messages()
    assert set(library.remedies_of(["old => a newer one", ""], found).values()) == {"a newer one"}
    exact, other = found[3], found[4]
    assert list(library.remedies_of(["nothing here => look"], found)) == [exact]
    assert list(library.remedies_of(["… here => look"], found)) == [other]
    for line in ("gone => look", "old"):
        with pytest.raises(library.MessageError, match="no message has the words"):
            library.remedies_of([line], found)


def test_every_message_of_the_library_is_on_the_page_with_what_to_try(page):
    text = (ROOT / "docs/messages.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\{messages\} (.*?)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    shown = []
    for part, body in blocks:
        found = page.of_part(part)
        lines = [line for line in body.splitlines() if not line.startswith(":otherwise:")]
        remedies = page.remedies_of(lines, found)
        shown += found
        if ":otherwise:" not in body:
            silent = [m for m in found if m not in remedies and not page.ADVICE.search(m.text)]
            assert silent == []
    assert sorted(m.text for m in shown) == sorted(m.text for m in page.messages())
    assert len(shown) > 400
