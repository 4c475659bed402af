"""Docstrings of public names: every argument is explained, every function and class has an example."""

import ast
import importlib
import inspect
import re
import textwrap

import pytest

MODULES = ("decomp", "nn", "peft", "serve", "plot", "cli")
#: Errors and named tuples, whose functions have the example; the same holds for abstract classes.
KINDS = (BaseException, tuple)


def public():
    """Public functions and classes of the library, each once, by their full names."""
    seen = {}
    for module in MODULES:
        lent = importlib.import_module(f"lortalib.{module}")
        for name in lent.__all__:
            value = getattr(lent, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                seen.setdefault(value, f"{module}.{name}")
    return {name: value for value, name in seen.items()}


PUBLIC = public()


def methods():
    """Public functions, and public methods that the library defines itself; what overrides a method of torch
    or PEFT has the arguments that their documentation explains."""
    for name, value in PUBLIC.items():
        if inspect.isfunction(value):
            yield name, value
            continue
        for base in value.__mro__:
            foreign = [each for each in value.__mro__ if not each.__module__.startswith("lortalib")]
            for own, method in vars(base).items():
                method = getattr(method, "__func__", method)
                ours = base.__module__.startswith("lortalib") and not own.startswith("_")
                if (
                    ours
                    and inspect.isfunction(method)
                    and not any(hasattr(f, own) for f in foreign)
                ):
                    yield f"{name}.{own}", method


FUNCTIONS = dict(methods())


def unexplained(function):
    """The arguments that a docstring has no line for, and does not name in its text."""
    text = inspect.getdoc(function) or ""
    lines = re.findall(r"^ *((?:\*{0,2}\w+, )*\*{0,2}\w+):", text, re.M)
    explained = {name.strip("* ") for line in lines for name in line.split(",")}
    explained |= {*re.findall(r"``(\w+)", text)}
    return sorted(inspect.signature(function).parameters.keys() - explained - {"self", "cls"})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_explained(name):
    assert unexplained(FUNCTIONS[name]) == []


@pytest.mark.parametrize("name", PUBLIC)
def test_every_function_and_class_has_an_example(name):
    value = PUBLIC[name]
    kind = inspect.isclass(value) and (issubclass(value, KINDS) or inspect.isabstract(value))
    if not kind:
        assert ">>> " in (value.__doc__ or "")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_that_a_function_raises_itself_are_listed(name):
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(FUNCTIONS[name]))))
    raises = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
    if raises:
        assert "Raises:" in (inspect.getdoc(FUNCTIONS[name]) or "")
