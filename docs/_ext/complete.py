"""The build fails where the documentation has a gap.

A gap is a public name, method or field of the library that the reference does not document, a registered
format without a page, a page of a format that is not registered, or a page in no table of contents.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import SphinxError

from lortalib import decomp


class IncompleteError(SphinxError):
    """The documentation has a gap."""

    category = "incomplete documentation"


MODULES = (
    "lortalib",
    "lortalib.decomp",
    "lortalib.nn",
    "lortalib.peft",
    "lortalib.serve",
    "lortalib.plot",
    "lortalib.cli",
)
FORMATS = "formats/"


def public_names(module: ModuleType) -> list[str]:
    """What a module offers: ``__all__``, else whatever has no underscore and is no import of a module."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]


def public_members(kind: type) -> list[str]:
    """Methods and properties that a class defines itself, or takes from a private class of the library."""
    called = (property, classmethod, staticmethod)
    fields = record_fields(kind)
    public = [getattr(m, n) for m in map(importlib.import_module, MODULES) for n in public_names(m)]
    own = [
        base
        for base in kind.__mro__
        if base is kind or (base.__module__.startswith("lortalib") and base not in public)
    ]
    members = {name: value for base in reversed(own) for name, value in vars(base).items()}
    return [
        name
        for name, value in members.items()
        if not name.startswith("_")
        and name not in fields
        and (isinstance(value, called) or inspect.isfunction(value))
    ]


def record_fields(kind: type) -> list[str]:
    """Fields of a dataclass or a named tuple."""
    if dataclasses.is_dataclass(kind):
        own = {field.name for field in dataclasses.fields(kind)}
        return [name for name in vars(kind).get("__annotations__", {}) if name in own]
    return list(getattr(kind, "_fields", ()))


def undocumented(documented: set[str]) -> Iterator[str]:
    """Public names, methods and fields that are not among the documented objects."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in public_names(module):
            value: Any = getattr(module, name)
            full = f"{module_name}.{name}"
            if full not in documented:
                yield f"{full} is public and not in the reference"
            elif inspect.isclass(value):
                for member in public_members(value):
                    if f"{full}.{member}" not in documented:
                        yield f"{full}.{member} is public and not in the reference"
                for field in record_fields(value):
                    said = re.search(rf"^\s*(\w+, )*{field}(, \w+)*:", value.__doc__ or "", re.M)
                    if not said and f"{full}.{field}" not in documented:
                        yield f"neither the docstring of {full} nor the reference says what {field} is"


def pages_of_formats(pages: set[str]) -> Iterator[str]:
    """Registered formats without a page, and pages without a registered format."""
    for name in decomp.formats:
        if FORMATS + name not in pages:
            yield f"the format {name} is registered and has no page docs/{FORMATS}{name}.md"
    for page in pages:
        if page.startswith(FORMATS) and page.removeprefix(FORMATS) not in decomp.formats:
            yield f"docs/{page}.md is the page of no registered format"


def unlisted(env: BuildEnvironment) -> Iterator[str]:
    """Pages that no table of contents lists."""
    listed = {page for pages in env.toctree_includes.values() for page in pages}
    for page in sorted(env.found_docs - listed - {env.config.root_doc}):
        yield f"docs/{page}.md is in no table of contents"


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Hold the pages that were read against the library.

    Raises:
        IncompleteError: there is a gap; all of them are named.
    """
    documented = {entry[0] for entry in env.get_domain("py").get_objects()}
    gaps = [*undocumented(documented), *pages_of_formats(set(env.found_docs)), *unlisted(env)]
    if gaps:
        raise IncompleteError("\n  " + "\n  ".join(gaps))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the check."""
    app.connect("env-updated", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
