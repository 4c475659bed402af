"""The directive ``rooms``: the files of a package, each with the first sentence of its docstring.

```{rooms} lortalib/decomp
```
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]


def first_sentence(file: Path) -> str:
    """Of the docstring of a module, without what follows a colon's or a sentence's end."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.]) ", paragraph)[0].rstrip(".")


class Rooms(SphinxDirective):
    """``{rooms} folder``: a table of its files."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The table, parsed like the page around it."""
        folder = ROOT / self.arguments[0]
        files = sorted(
            file
            for file in folder.rglob("*.py")
            if file.name != "__init__.py"
            and "_" in {file.stem[0], *(p[0] for p in file.relative_to(folder).parts)}
        )
        lines = ["| file | |", "|---|---|"]
        for file in files:
            self.env.note_dependency(str(file))
            name = file.relative_to(folder).with_suffix("").as_posix()
            lines.append(f"| `{name}` | {first_sentence(file)} |")
        parent = nodes.Element()
        self.state.nested_parse(StringList(lines, self.arguments[0]), 0, parent)
        return parent.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("rooms", Rooms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
