"""Private names of torch stand in one file of the library, and are all still there."""

import ast
import importlib
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import lortalib
from lortalib import _torch

ROOT = Path(lortalib.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
LIBRARIES = ("torch", "transformers")
HOME = "_torch.py"

#: Private names of torch and transformers that other files may use, with the reason.
KNOWN = {
    "_parameters": "a weight as it is stored, where reading the attribute adds an update",
    "_modules": "a submodule by its name, where an attribute may be anything",
    "_base": "whether a tensor is a view of a parameter",
    "_version": "torch's count of the changes of a tensor",
    "_forward_hooks": "whether anybody else sees the output of a module, and in which order",
    "_apply": "how a module takes part where one around it is moved; to_empty has no public hook",
    "_load_from_state_dict": "how a module takes its part of a state_dict; torch has no public hook for it",
    "torch.nn.modules.conv._ConvNd": "convolutions of any dimension: their only common class",
    "torch.ops.aten._unsafe_view.default": "the name of an operation",
    "_from_config": "transformers' way from a config to a model of its class",
    "_experts_implementation": "what a config says of its packed experts",
    "_attn_implementation": "which attention a model computes, which continuous batching replaces",
    "_name_or_path": "where transformers keeps the name of a model",
    "_hf_hook": "what accelerate puts on a module that it moves",
}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names_of(*objects):
    """Private attributes that these objects have, and others of their kind do not get from Python."""
    found = {name for each in objects for name in (*dir(each), *vars(type(each)))}
    return set(filter(is_private, found - {*dir(object())}))


#: Private attributes of the objects that the library meets.
FOREIGN = private_names_of(
    nn.Linear(2, 2),
    nn.MultiheadAttention(2, 1),
    torch.ones(1),
    nn.Parameter(torch.ones(1)),
    torch.ones(1, requires_grad=True).sum().grad_fn,
    transformers.BertConfig(),
    transformers.PreTrainedModel,
)


def full_names(tree):
    """Of each name that a file imports from one of the libraries, what it stands for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                names[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {name: full for name, full in names.items() if full.partition(".")[0] in LIBRARIES}


def chain(node):
    """``a.b.c`` as ["a", "b", "c"], or nothing where it starts with anything but a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def private_paths(path):
    """Names of the libraries that a file uses by import, with a private part: ``torch._C._x`` ..."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = full_names(tree)
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    found = set(names.values())
    for node in ast.walk(tree):
        parts = chain(node) if isinstance(node, ast.Attribute) and id(node) not in inner else []
        if parts and parts[0] in names:
            found.add(".".join([names[parts[0]], *parts[1:]]))
    return sorted(name for name in found if any(map(is_private, name.split("."))))


def private_attributes(path):
    """Private attributes of the libraries' objects: ``module._forward_hooks``, and by getattr."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in FOREIGN:
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            name = getattr(node.args[1], "value", "")
            if is_private(str(name)) and "lortalib" not in name:
                found.add(name)
    return found


def resolve(name):
    """The object of a full name: the longest module of it, then attributes."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:k]))
        except ImportError:
            continue
        for part in parts[k:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


@pytest.mark.parametrize("name", private_paths(FILES[HOME]))
def test_a_private_name_of_torch_is_still_there(name):
    resolve(name)


def test_what_they_tell_is_still_so():
    """That they are there says little: each is asked where its answer is known."""
    assert not _torch.is_tracing()
    told = []
    torch.func.vmap(lambda x: (told.append(_torch.is_tracing()), x)[1])(torch.ones(2))
    torch.jit.trace(
        lambda x: (told.append(_torch.is_tracing()), x)[1], torch.ones(2), check_trace=False
    )
    with torch._subclasses.fake_tensor.FakeTensorMode():
        told.append(_torch.is_tracing())
    with torch.autograd.forward_ad.dual_level():
        told.append(_torch.is_tracing())
    make_fx(lambda x: (told.append(_torch.is_tracing()), x + 1)[1])(torch.ones(2))
    assert told
    assert all(told)

    assert not _torch.is_recorded()
    for mode in create_selective_checkpoint_contexts([]):
        with mode:
            assert not _torch.is_tracing()
            assert _torch.is_recorded()

    x = torch.ones(2, requires_grad=True)
    told = [_torch.is_in_backward()]
    x.register_hook(lambda gradient: told.append(_torch.is_in_backward()))
    x.sum().backward()
    assert told == [False, True]

    assert not _torch.has_global_forward_hooks()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert _torch.has_global_forward_hooks()
    handle.remove()


OTHERS = [name for name in FILES if name != HOME]


def private_names(name):
    return {*private_paths(FILES[name]), *private_attributes(FILES[name])}


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_file_uses_a_private_name(name):
    assert sorted(private_names(name) - KNOWN.keys()) == []


def test_what_is_known_is_used():
    assert sorted(KNOWN.keys() - set().union(*map(private_names, OTHERS))) == []


def test_the_finder_finds_them(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(
        "import torch\nfrom torch import nn\nfrom torch.nn import _reduction\n"
        "torch._C._x()\nnn.Module._y\nself.module._modules\nself._own\ngetattr(m, '_w')\n__doc__\n"
    )
    assert private_paths(path) == ["torch._C._x", "torch.nn.Module._y", "torch.nn._reduction"]
    assert private_attributes(path) == {"_modules", "_w"}
