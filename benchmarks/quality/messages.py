"""The messages of Sphinx and their translations, as rows of token ids for languages.py."""

from __future__ import annotations

import gettext
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import assets

#: Rows of a step, the largest number of tokens of a row, the largest number of rows of a test.
BATCH, TOKENS, TESTED = 6, 48, 32
#: More rows of one language than any training asks for.
ENOUGH = 480

#: The token ids of a prompt and its translation, and the length of the prompt.
Row = tuple[list[int], int]


@cache
def tokenizer() -> Any:
    """Of the base."""
    return AutoTokenizer.from_pretrained(assets.smollm2())


def catalogues() -> dict[str, dict[str, str]]:
    """The translated messages of every language, those with most messages first."""
    found = {}
    for file in assets.package_folder("sphinx", "sphinx").glob("locale/*/LC_MESSAGES/sphinx.mo"):
        with open(file, "rb") as binary:
            messages = gettext.GNUTranslations(binary)._catalog
        known = {k: v for k, v in messages.items() if isinstance(k, str) and k and v and v != k}
        found[file.parents[1].name] = known
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


@cache
def rows_of(language: str) -> dict[str, list[Row]]:
    """The token ids of prompts and translations, and the lengths of the prompts."""
    found: dict[str, list[Row]] = {"train": [], "test": []}
    for message, translation in sorted(catalogues()[language].items(), key=lambda m: digest(m[0])):
        start = tokenizer()(f"English: {message}\nTranslation:")["input_ids"]
        end = tokenizer()(f" {translation}\n")["input_ids"]
        if len(start) + len(end) <= TOKENS:
            part = "test" if int(digest(message), 16) % 5 == 0 else "train"
            found[part].append((start + end, len(start)))
    return {"train": found["train"], "test": found["test"][:TESTED]}


def digest(message: str) -> str:
    """A number of a message, which decides whether it is in the test and where it stands."""
    return hashlib.sha256(message.encode()).hexdigest()


def batches(languages: Sequence[str]) -> Iterator[list[Row]]:
    """Rows of the languages in turn."""
    rows = [row for rows in zip(*(cycle(language) for language in languages)) for row in rows]
    while True:
        yield from (rows[k : k + BATCH] for k in range(0, len(rows) - BATCH + 1, BATCH))


def cycle(language: str) -> list[Row]:
    """The first rows to train on, again from the begin when they are used up."""
    rows = rows_of(language)["train"]
    return (rows * math.ceil(ENOUGH / len(rows)))[:ENOUGH]
