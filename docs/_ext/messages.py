"""The directive ``messages``: all messages of errors and warnings of a part of the library, from its source.

    ```{messages} decomp/*
    words of a message => what to try, where the message does not say it
    ```

What the code fills in is an ellipsis. The build fails if a message neither says what to try nor has a remedy
on the page, if a remedy goes with no message, and if a part of the library has no directive.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import SphinxError
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2] / "lortalib"
FILLED = "…"
#: Words by which a message says what to try, or what would have been right.
ADVICE = re.compile(
    r"\b(add|align|apply|ask|begin|call|change|check|choose|close|convert|copy|del|divide|do|download|draw"
    r"|exclude|export|fit|gather|join"
    r"|give|go|have|install|leave|list|load|log in|look|lower|make|merge|move|name|pass|pick|put|read|remove"
    r"|rename|run|save|say|see|select|set|start|stop|take|train|try|turn|unmerge|unset|update|upgrade|use|wait"
    r"|write|must|needs?|only|known|there (is|are)|the names are|at least|or more|expected|instead"
    r"|did you mean|first|by itself)\b",
    re.IGNORECASE,
)


class MessageError(SphinxError):
    """The page of messages has a gap."""

    category = "incomplete page of messages"


@dataclass(frozen=True)
class Message:
    """One message: its words, the kind of error or warning, its function, its file below ``lortalib``."""

    text: str
    kind: str
    function: str
    file: str


def words(node: ast.expr) -> str:
    """The text of an expression; what it fills in is an ellipsis."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left) + words(node.right)
    return FILLED


def called(node: ast.AST | None) -> str:
    """The name of what a call calls, without the object that it belongs to."""
    return ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""


def texts(call: ast.Call, functions: dict[str, ast.FunctionDef]) -> Iterator[str]:
    """The texts of an error's first argument, also where a function of the library writes it."""
    argument = call.args[0] if call.args else None
    if isinstance(argument, ast.Call) and called(argument) in functions:
        for node in ast.walk(functions[called(argument)]):
            if isinstance(node, ast.Return) and node.value is not None:
                yield words(node.value)
    elif argument is not None:
        yield words(argument)


def in_tree(tree: ast.AST, name: str, functions: dict[str, ast.FunctionDef]) -> Iterator[Message]:
    """The messages of a file, in their order."""

    def within(node: ast.AST, owner: str) -> Iterator[Message]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            owner = f"{owner}.{node.name}".lstrip(".")
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call, kind = node.exc, called(node.exc)
        elif called(node) == "warn":
            category = [each for each in node.args[1:2] if isinstance(each, ast.Name)]
            call, kind = node, category[0].id if category else "UserWarning"
        else:
            call, kind = None, ""
        if call is not None:
            for text in texts(call, functions):
                yield Message(" ".join(text.split()), kind, owner, name)
        for child in ast.iter_child_nodes(node):
            yield from within(child, owner)

    return within(tree, "")


def messages() -> list[Message]:
    """The messages of the library, each once; without those whose words are all filled in."""
    return list(below(ROOT))


@cache
def below(root: Path) -> tuple[Message, ...]:
    """The messages of all files below a folder."""
    trees = {
        file.relative_to(root).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted(root.rglob("*.py"))
    }
    functions = {
        node.name: node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    found = [m for name, tree in trees.items() for m in in_tree(tree, name, functions)]
    return tuple({(m.text, m.kind): m for m in found if re.search("[A-Za-z]", m.text)}.values())


def of_part(part: str) -> list[Message]:
    """The messages of the files that patterns name, such as ``nn/* nn/_bank/*``."""
    pattern = "|".join(re.escape(each).replace(r"\*", "[^/]*") for each in part.split())
    return [message for message in messages() if re.fullmatch(pattern, message.file)]


def remedies_of(lines: Iterable[str], found: list[Message]) -> dict[Message, str]:
    """The remedies of a directive's body, by message.

    Raises:
        MessageError: a remedy goes with no message.
    """
    remedies = {}
    for line in filter(None, lines):
        piece, _, remedy = line.partition(" => ")
        exactly = [message for message in found if piece == message.text]
        fitting = exactly or [message for message in found if piece in message.text]
        if not fitting or not remedy:
            raise MessageError(
                f"no message has the words {piece!r}, or no remedy stands behind them"
            )
        remedies |= dict.fromkeys(fitting, remedy)
    return remedies


def cell(text: str) -> str:
    """A message as code in the cell of a table."""
    return "`` " + text.replace("|", "\\|") + " ``"


class Messages(SphinxDirective):
    """``{messages} files``: a table; its body has the remedies that messages do not name themselves."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True
    option_spec: ClassVar = {"otherwise": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """The table, parsed like the page around it."""
        found = of_part(self.arguments[0])
        remedies = remedies_of(self.content, found)
        lines = ["| message | raised | what to try |", "|---|---|---|"]
        for message in found:
            self.env.note_dependency(str(ROOT / message.file))
            remedy = remedies.get(message, "")
            if not remedy and not ADVICE.search(message.text):
                remedy = self.options.get("otherwise", "")
                if not remedy:
                    raise MessageError(f"docs/{self.env.docname}.md has no remedy for {message}")
            raised = f"`{message.kind}` in `{message.file}`"
            lines.append(f"| {cell(message.text)} | {raised} | {remedy} |")
        parent = nodes.container(classes=["wide", "filter", "messages"])
        self.state.nested_parse(StringList(lines, self.arguments[0]), 0, parent)
        return [parent]


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Hold the page of messages against the library.

    Raises:
        MessageError: a part of the library has no table.
    """
    page = Path(app.srcdir, "messages.md").read_text(encoding="utf-8")
    parts = " ".join(re.findall(r"^```\{messages\} (.*)$", page, re.MULTILINE))
    missing = {message.file for message in messages()} - {m.file for m in of_part(parts)}
    if missing:
        raise MessageError(f"docs/messages.md has no table for {', '.join(sorted(missing))}")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive and the check."""
    app.add_directive("messages", Messages)
    app.connect("env-updated", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
