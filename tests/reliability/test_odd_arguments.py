"""Arguments of wrong types, empty, negative, NaN: errors that name the argument, in words of the library."""

import re

import numpy as np
import pytest
import torch
from adapted import put
from models import FAMILIES

from lortalib import decomp as D
from lortalib.cli import main

SHAPE = {"layer": 3, "in": 4, "out": 5}
NAN, INF = float("nan"), float("inf")


def net(line="cp", value=None):
    made = D.network(line, SHAPE, 2, init="normal")
    if value is not None:
        with torch.no_grad():
            made.stored[0][0, 0] = value
    return made


def entry(at):
    return 1 / (1 + at.sum(1).double())


def fitted(**options):
    return D.fit(torch.ones(3, 4, 5), "cp", 2, **{"modes": "layer in out", **options})


def start(change):
    """A start that returns what `change` makes of the shapes of the line."""
    return lambda legs, sizes, *_: change([[sizes[leg] for leg in t.legs] for t in legs.terms])


#: By a name: what is called, and a part of the message.
CALLS = {
    "cross, rank 1.5": (lambda: D.cross(entry, SHAPE, 1.5), "rank must be an integer; found 1.5"),
    "cross, rank text": (lambda: D.cross(entry, SHAPE, "3"), "rank must be an integer; found '3'"),
    "cross, rank None": (lambda: D.cross(entry, SHAPE, None), "rank must be an integer"),
    "cross, rank True": (lambda: D.cross(entry, SHAPE, True), "rank must be an integer"),
    "cross, rank 0": (lambda: D.cross(entry, SHAPE, 0), "rank must be finite and at least 1"),
    "cross, tolerance": (lambda: D.cross(entry, SHAPE, 2, tolerance="x"), "tolerance must be a number"),
    "cross, NaN": (lambda: D.cross(entry, SHAPE, 2, tolerance=NAN), "tolerance must be finite"),
    "cross, sweeps": (lambda: D.cross(entry, SHAPE, 2, sweeps=None), "sweeps must be an integer"),
    "init, None": (lambda: D.cp(SHAPE, 2, init=start(lambda _: None)), "return a list of torch tensors"),
    "init, dict": (lambda: D.cp(SHAPE, 2, init=start(lambda _: {})), "found dict"),
    "init, NumPy": (lambda: D.cp(SHAPE, 2, init=start(lambda s: [*map(np.zeros, s)])), "found .'ndarray'"),
    "init, few": (lambda: D.cp(SHAPE, 2, init=start(lambda s: [torch.zeros(s[0])])), "of the shapes"),
    "init, shapes": (
        lambda: D.cp(SHAPE, 2, init=start(lambda s: [torch.zeros(1)] * 3)), r"found .\(1,\)",
    ),
    "init, complex": (
        lambda: D.cp(SHAPE, 2, init=start(lambda s: [torch.zeros(n) * 1j for n in s])), "real numbers",
    ),
    "init, NaN": (
        lambda: D.cp(SHAPE, 2, init=start(lambda s: [torch.zeros(n) * NAN for n in s])),
        r"found NaN or infinity for \(in r",
    ),
    "init, meta": (
        lambda: D.cp(SHAPE, 2, init=start(lambda s: [torch.zeros(n, device="meta") for n in s])),
        "without values, on meta",
    ),
    "init, list": (lambda: D.cp(SHAPE, 2, init=["normal"]), "unknown init"),
    "mode_dot, NumPy": (lambda: net().mode_dot(np.ones((2, 4)), "in"), "found ndarray. Try torch.as_tensor"),
    "mode_dot, list": (lambda: net().mode_dot([[1.0] * 4], "in"), "found list"),
    "mode_dot, dtype": (lambda: net().mode_dot(torch.ones(2, 4).double(), "in"), "one of torch.float64"),
    "mode_dot, shape": (lambda: net().mode_dot(torch.ones(4, 2), "in"), r"found \(4, 2\)"),
    "network, NumPy": (lambda: D.Network("in r, out r", [np.ones((2, 2))] * 2, ["in", "out"]), "ndarray"),
    "network, integers": (
        lambda: D.Network("in r, out r", [torch.ones(2, 2).long()] * 2, ["in", "out"]), "torch.int64",
    ),
    "network, dtypes": (
        lambda: D.Network("in r, out r", [torch.ones(2, 2), torch.ones(2, 2).double()], ["in", "out"]),
        "of one floating-point dtype",
    ),
    "shape None": (lambda: D.cp(None, 2), "a shape is a tuple or a mapping; found NoneType"),
    "shape, name": (lambda: D.cp({3: 4}, 2), "names; found 3"),
    "line None": (lambda: D.network(None, SHAPE, 2), "found NoneType"),
    "line, bytes": (lambda: D.get_format(b"cp"), "found bytes"),
    "parse, list": (lambda: D.Legs.parse(["cp"]), "a line of legs is a text; found list"),
    "fit, tolerance": (lambda: fitted(tolerance="x"), "tolerance must be a number"),
    "fit, sweeps": (lambda: fitted(sweeps=1.5), "sweeps must be an integer"),
    "fit, restarts": (lambda: fitted(restarts=-1), "restarts must be finite and at least 0"),
    "fit, mask": (lambda: fitted(mask="x"), "nested numbers; found str"),
    "fit, None": (lambda: D.fit(None, "cp", 2, modes="layer in out"), "nested numbers; found NoneType"),
    "round, rank 1.5": (lambda: D.round(net("tt"), rank=1.5), "must be an integer >= 1; found 1.5"),
    "round, rank by bond": (lambda: D.round(net("tt"), rank={"a": 1, "b": 0}), "rank of bond 'b'"),
    "round, error": (lambda: D.round(net("tt"), error="x"), "error is relative, .*; found 'x'"),
    "scale": (lambda: D.scale(net(), "x"), "scaled by a number; found str"),
    "weights": (lambda: D.direct_sum([net()], ["x"]), "weights are numbers"),
    "start_along": (lambda: D.start_along(np.ones((2, 2)), "in out"), "a torch tensor; found ndarray"),
    "environment": (lambda: D.environment(net(), 1.5), "no parameter 1.5"),
}  # fmt: skip

CALLS |= {
    f"device {device!r}": (
        lambda device=device: D.cp(SHAPE, 2, device=device),
        "device must be a device of torch",
    )
    for device in (-1, 1.5, "x", [], 2**70, True)
}
CALLS |= {
    f"{name}, generator {odd!r}": (
        lambda call=call, odd=odd: call(odd),
        "generator must be a torch.Generator",
    )
    for name, call in {
        "network": lambda odd: D.cp(SHAPE, 2, generator=odd),
        "fit": lambda odd: fitted(generator=odd),
        "cross": lambda odd: D.cross(entry, SHAPE, 2, generator=odd),
        "grow": lambda odd: D.grow(net(), 3, generator=odd),
        "suggest_rank": lambda odd: D.suggest_rank(net(), "cp", generator=odd),
    }.items()
    for odd in (0, "", "x", torch.ones(2))
}
CALLS |= {
    "fit, progress": (
        lambda: fitted(progress="x"),
        "progress must be a function, or None; found 'x'",
    ),
    "fit, meta": (
        lambda: D.fit(torch.ones(3, 4, 5, device="meta"), "cp", 2, modes="a b c"),
        "meta .* a fit needs",
    ),
    "start_along, meta": (
        lambda: D.start_along(torch.ones(2, 2, device="meta"), "in out"),
        "has no numbers",
    ),
    "round, meta": (lambda: D.round(net().to("meta"), rank=1), "rounding needs them"),
    "conditioning, meta": (lambda: D.conditioning(net().to("meta")), "has no numbers"),
    "multilinear_ranks, meta": (lambda: D.multilinear_ranks(net().to("meta")), "has no numbers"),
    "norm, over": (
        lambda: D.norm(net(), over=3),
        "over must be a name, or a list of names; found 3",
    ),
    "norm, over a number": (lambda: D.norm(net(), over=[3]), "over must be a name"),
    "budget, None": (
        lambda: D.budget(None, 9),
        "a shape must be a tuple or a mapping.*; found None",
    ),
    "budget, lines": (
        lambda: D.budget(SHAPE, 999, 3),
        "lines must be a list of texts, or None; found 3",
    ),
    "suggest_rank, ranks": (
        lambda: D.suggest_rank(net(), "cp", 3),
        "ranks must be a list; found 3",
    ),
    "suggest_rank, held_out": (
        lambda: D.suggest_rank(net(), "cp", held_out="x"),
        "held_out must be a number",
    ),
    "select": (lambda: net().select(layer=1.5), "select takes one integer for 'layer'; found 1.5"),
    "size beyond 64 bits": (
        lambda: D.cp({"in": 2**63, "out": 2}, 1),
        "'in' must fit 64 bits; found",
    ),
    "parameter beyond 64 bits": (lambda: D.cp({"in": 2**58, "out": 2}, 2), "64 bits can address"),
    "ridge beyond floats": (lambda: fitted(ridge=10**400), "ridge must be finite"),
    "rank, bytes": (lambda: D.cp(SHAPE, b"x"), "must be an integer >= 1; found b'x'"),
    "rank, tensor": (lambda: D.cp(SHAPE, torch.ones(2)), "must be an integer >= 1; found tensor"),
    "prune, tensor": (
        lambda: D.prune(net(), torch.ones(2)),
        "must be an integer >= 1; found tensor",
    ),
    "rank by number": (lambda: D.cp(SHAPE, {3: 1}), "ranks were given for 3"),
    "congruence, bond": (lambda: D.congruence(net(), None, []), r"no bond \[\]"),
    "core_consistency": (
        lambda: D.core_consistency(net(), 3),
        "target must be a tensor or a network; found 3",
    ),
    "direct_sum": (lambda: D.direct_sum(3), "direct_sum takes a list of networks"),
}
CALLS |= {
    f"{name}, other": (
        lambda name=name: getattr(D, name)(net(), "x"),
        "other must be a network.*; found 'x'",
    )
    for name in ("inner", "distance", "hadamard", "congruence")
}

#: What takes a network first, and whatever else it needs.
FUNCTIONS = {
    "absorb": (0,), "balance": (), "canonical": (), "component_norms": (), "conditioning": (),
    "congruence": (), "convert": ("tt",), "core_consistency": (torch.ones(3, 4, 5),), "distance": (net(),),
    "draw": (), "environment": (0,), "gram": (0,), "hadamard": (net(),), "inner": (net(),),
    "multilinear_ranks": (), "norm": (), "round": (), "scale": (2.0,),
    "singular_values": (), "to_tensorly": (),
}  # fmt: skip

NEED_FINITE = {
    "canonical": D.canonical,
    "convert": lambda one: D.convert(one, "tucker"),
    "convert to ranks": lambda one: D.convert(one, "tt", 1),
    "core_consistency": lambda one: D.core_consistency(one, net()),
    "multilinear_ranks": D.multilinear_ranks,
    "round": lambda one: D.round(one, rank=1),
    "round to an error": lambda one: D.round(one, error=0.5),
    "singular_values": D.singular_values,
    "fit": lambda one: D.fit(one, "tucker", 2),
}


@pytest.mark.filterwarnings("ignore:ranks larger than the modes can fill")
@pytest.mark.parametrize("name", CALLS)
def test_the_argument_is_named(name):
    call, message = CALLS[name]
    with pytest.raises((TypeError, ValueError, KeyError), match=message):
        call()


@pytest.mark.parametrize("given", [None, 3, "x", torch.ones(3, 4, 5), np.ones(3), []])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_networks_are_networks(name, given):
    with pytest.raises(TypeError, match=f"{name} takes a network.*; found {type(given).__name__}"):
        getattr(D, name)(given, *FUNCTIONS[name])
    assert callable(getattr(D, name))
    getattr(D, name)(net(), *FUNCTIONS[name], **({"rank": 1} if name == "round" else {}))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", NEED_FINITE)
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match=r"NaN or infinity|not finite|finite"):
        NEED_FINITE[name](net("cp" if name == "core_consistency" else "tt", value))


@pytest.mark.parametrize("line", ["cp", "in.1 r, in.2 r, layer r, out r"])
@pytest.mark.parametrize("positions", [[4], [-1], [0, -5], [2**40]])
def test_positions_outside_a_mode_are_refused(line, positions):
    with pytest.raises(
        IndexError, match=f"positions of 'in' must be from 0 to 3; found {positions[-1]}"
    ):
        net(line).index_select("in", torch.tensor(positions))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    model = FAMILIES["Llama"].model("ForCausalLM")
    model.save_pretrained(root / "model")
    put(model).save(root / "adapter")
    (root / "file").write_text("x")
    return root


def paths_of(folders, empty):
    return {
        "MODEL": folders / "model", "ADAPTER": folders / "adapter", "FILE": folders / "file",
        "FILE/x": folders / "file" / "x", "OUT": empty / "out", "RO": "/proc/nowhere/out",
    }  # fmt: skip


#: Arguments of a command, and a part of the message; MODEL, ADAPTER and FILE stand for paths.
COMMANDS = [
    (("convert", "ADAPTER", ""), "found an empty text"),
    (("convert", "", "OUT"), "found an empty text"),
    (("convert", "ADAPTER", "FILE"), "a folder is needed; .*file is a file"),
    (("convert", "ADAPTER", "FILE/x"), "a folder is needed; .*file is a file"),
    (("merge", "MODEL", "ADAPTER", "FILE"), "a folder is needed"),
    (("merge", "MODEL", "ADAPTER", ""), "found an empty text"),
    (("info", ""), "found an empty text"),
    (("info", " "), "found an empty text"),
    (("check", "ADAPTER", "--model", ""), "found an empty text"),
    (
        ("compare", "ADAPTER", "ADAPTER", "--tolerance", "nan"),
        "of at least 0 is needed.*found 'nan'",
    ),
    (("compare", "ADAPTER", "ADAPTER", "--tolerance", "-1"), "found '-1'"),
    (("verify", "ADAPTER", "--tolerance", "x"), "found 'x'"),
    (("plan", "MODEL", "--rank", ","), "a rank, such as 8 or 1,4,16 is needed; found ','"),
    (("plan", "MODEL", "--rank", ""), "is needed; found ''"),
    (("plan", "MODEL", "--rank", "-1"), "at least 1 is needed; found -1"),
    (("plan", "MODEL", "--rank", "x"), "an integer is needed; found 'x'"),
    (("plan", "MODEL", "--decomposition", ""), "a name is needed; found ''"),
    (("plan", "MODEL", "--targets", ""), "found an empty text"),
    (("plan", "MODEL", "--numbers", "x"), "an integer is needed; found 'x'"),
    (("plan", ""), "found an empty text"),
    (("compress", "ADAPTER", ""), "found an empty text"),
    (("compress", "ADAPTER", "OUT", "--rank", "-1"), "at least 1 is needed"),
    (("compress", "ADAPTER", "OUT", "--sweeps", "0"), "at least 1 is needed"),
    (("compress", "ADAPTER", "OUT", "--to", ""), "found an empty text"),
    (("compress", "ADAPTER", "--rank", "2", "ADAPTER", ""), "unrecognized arguments"),
]


#: The same for paths that only the command itself can judge; RO stands for one that cannot be made.
PATHS = [
    (("export-lora", "ADAPTER", "FILE"), "a folder is needed; .*file is a file. Give another path"),
    (
        ("export-lora", "ADAPTER", "FILE/x"),
        "a folder is needed; .*file is a file. Give another path",
    ),
    (
        ("export-lora", "ADAPTER", "MODEL", "--format", "gguf", "--model", "MODEL"),
        "a file is needed; .*is a folder",
    ),
    (("convert", "ADAPTER", "RO"), "/proc/.*: No such file or directory. Give another path"),
    (("export-lora", "ADAPTER", "RO"), "/proc/.*: No such file or directory. Give another path"),
    (("merge", "MODEL", "ADAPTER", "RO"), "/proc/.*: No such file or directory. Give another path"),
    (("info", "FILE"), "file is damaged or cut short"),
    (("info", "FILE/x"), "no adapter.safetensors in .*file/x; a saved adapter is a folder"),
    (("merge", "FILE", "ADAPTER", "OUT"), "file holds no config.json.*Give one"),
    (("merge", "MODEL", "FILE", "OUT"), "file is damaged or cut short"),
    (("plan", "FILE/x"), "there is no folder .*file/x; give a folder of a model"),
    (("sites", "OUT"), "there is no folder .*out; give a folder of a model"),
    (("compress", "ADAPTER", "OUT", "--model", "FILE/x"), "there is no folder .*file/x"),
]


@pytest.mark.parametrize(("arguments", "message"), COMMANDS, ids=lambda each: " ".join(each)[:40])
def test_a_command_names_the_argument_and_writes_nothing(
    arguments, message, folders, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    paths = paths_of(folders, tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([str(paths.get(each, each)) for each in arguments])
    assert caught.value.code == 2
    text = " ".join(capsys.readouterr().err.split())
    assert re.search(message, text), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "message"), PATHS, ids=lambda each: " ".join(each)[:40])
def test_a_command_names_the_path_and_writes_nothing(arguments, message, folders, tmp_path, capsys):
    paths = paths_of(folders, tmp_path)
    before = sorted(folders.rglob("*"))
    assert main([str(paths.get(each, each)) for each in arguments]) == 1
    text = " ".join(capsys.readouterr().err.split())
    assert re.search(message, text), text
    assert not list(tmp_path.iterdir())
    assert sorted(folders.rglob("*")) == before
