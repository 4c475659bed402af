"""The house: no circle of imports, no private name across packages, no long file."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

import lortalib

ROOT = Path(lortalib.__file__).parent
FILES = {
    ".".join(("lortalib", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}
#: Packages that others may only use by public names; what belongs to none of them is for all.
PACKAGES = ("decomp", "nn", "peft", "serve", "plot", "cli")
COMMON = {
    f"lortalib.{name}"
    for name in ("_columns", "_kinds", "_numbers", "_stacklevel", "_torch", "_version")
}


def module_of(name, node):
    """The absolute name of what an import statement of a module names."""
    if not node.level:
        return node.module or ""
    parts = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
    parts = parts[: len(parts) - (node.level - 1)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def imports(name, deferred=False):
    """(module, imported name) of a file's imports, those of type checking too; those within functions
    only if asked for."""
    tree = ast.parse(FILES[name].read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in inside and not deferred:
            continue
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield module_of(name, node), alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""


def graph():
    """From each file of the library to the files that it imports.

    A face (``__init__``) that a file of its own room imports from would be a circle; names that a face
    lends stand for the face. The doors of the library itself are loaded when they are touched.
    """
    arrows = defaultdict(set)
    for name in FILES:
        if name == "lortalib":
            continue
        for module, imported in imports(name):
            target = f"{module}.{imported}" if f"{module}.{imported}" in FILES else module
            if target in FILES and target != name:
                arrows[name].add(target)
    return arrows


def circles(arrows):
    """Strongly connected sets of more than one file."""
    found, index, low, stack, on = [], {}, {}, [], set()

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        on.add(node)
        for other in sorted(arrows.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in on:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            members = []
            while not members or members[-1] != node:
                members.append(stack.pop())
                on.discard(members[-1])
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return found


def test_the_finder_of_circles_finds_them():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == []


def test_no_circle_of_imports():
    assert circles(graph()) == []


def package(name):
    return name.split(".")[1] if name.count(".") else ""


@pytest.mark.parametrize("name", [name for name in FILES if package(name) in PACKAGES])
def test_no_private_name_of_another_package(name):
    foreign = [
        f"{module}:{imported}"
        for module, imported in imports(name, deferred=True)
        if module.startswith("lortalib")
        and module not in COMMON
        and package(module) != package(name)
        and re.search(r"(^|[.:])_(?!_)", f"{module}:{imported}".removeprefix("lortalib"))
    ]
    assert foreign == []


def rooms(name):
    """The private packages that a file stands in, outermost first."""
    parts = name.split(".")
    if FILES[name].name != "__init__.py":
        parts = parts[:-1]
    return [".".join(parts[: k + 1]) for k, part in enumerate(parts) if k and part.startswith("_")]


def test_a_room_is_entered_by_its_face():
    """A file of a private package is imported from within that package only."""
    past = [
        f"{name} -> {module}"
        for name in FILES
        for module, _ in imports(name, deferred=True)
        if module in FILES and FILES[module].name != "__init__.py"
        for room in rooms(module)
        if room not in rooms(name)
    ]
    assert past == []


@pytest.mark.parametrize("name", FILES)
def test_files_are_short(name):
    assert len(FILES[name].read_text().splitlines()) < 350
