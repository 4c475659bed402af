"""Arguments of a wrong kind at every public function of `lortalib.nn` and `lortalib.plot`: an error of the
library, which says what was found, and nothing changed."""

import inspect
import traceback
from pathlib import Path

import pytest
import torch
from adapted import put, unchanged
from banks import small_llama

import lortalib
from lortalib import decomp, nn, plot

HOME = str(Path(lortalib.__file__).parent)
NAN, INF, HUGE = float("nan"), float("inf"), 2**70
#: What UTF-8 has no form of, and what ends a text in C.
TEXTS = "a\ud800", "a\0b"


def anything():
    return [-1, 1.5, NAN, HUGE, "x", [None], {"x": None}, b"x", object(), torch.ones(3), iter("x")]


#: By kind: values that are none of it. Functions, because some can be used once only.
ODD = {
    "model": lambda: [None, [], *anything()],
    "adapter": lambda: [None, "", torch.nn.ReLU(), *anything()],
    "flag": lambda: [None, 0, "", "no", [], torch.ones(3), iter("x"), object()],
    "path": lambda: [None, 0, 1.5, "", *TEXTS, [], {}, b"x", torch.ones(3), True],
    "text": lambda: [0, 1.5, *TEXTS, ["x"], {}, b"x", torch.ones(3)],
    "name": lambda: [0, 1.5, "", "a.b", *TEXTS, ["x"], {}, b"x", torch.ones(3)],
    "texts": lambda: [0, NAN, None, [0], [None], [*TEXTS], object(), torch.ones(3)],
    "token": lambda: [0, 1.5, *TEXTS, ["x"], torch.ones(3)],
    "generator": lambda: [0, 1.5, "", "x", [], {}, torch.ones(3), True, iter("x")],
    "device": lambda: [-1, 1.5, "", "x", *TEXTS, [], {}, HUGE, True, torch.ones(3)],
    "dtype": lambda: [None, 32, "float32", torch.int64, torch.ones(3), []],
    "rules": lambda: [None, 0, "x", [None], ["x"], {"x": None}, torch.ones(3), iter("x")],
    "rank": lambda: [None, -1, 0, 1.5, NAN, INF, "", "x", [], b"x", {3: -1}, torch.ones(3), True, int],
    "alpha": lambda: [None, 0, NAN, INF, HUGE**9, "x", [], True, torch.ones(3)],
    "probability": lambda: [None, -1, 1, NAN, "x", [], True, torch.ones(3)],
    "size": lambda: [None, -1, 0, 1.5, NAN, HUGE, "x", [], True, torch.ones(3)],
    "number": lambda: [None, -1, NAN, INF, "x", [], True, torch.ones(3)],
    "bound": lambda: [None, -1, NAN, "x", [], True, torch.ones(3)],
    "word": lambda: [-1, 1.5, "x", [], {}, True, torch.ones(3), b"x"],
    "layers": lambda: [-1, 1.5, "x", [None], [1.5], True, HUGE, {"x": 1}, object(), torch.ones(3)],
    "legs": lambda: [None, "in", 0, [None], {}, b"x", torch.ones(3)],
    "tasks": lambda: [None, "s", 0, [None], ["a.b"], ["mean"], [*TEXTS], torch.ones(3)],
    "function": lambda: [0, "x", [], {}, torch.ones(3), True],
    "optimizer": lambda: [None, "x", [], {}, torch.ones(3), torch.nn.ReLU()],
    "group": lambda: [None, 0, "x", [], {}, torch.ones(3)],
    "hashable": lambda: [[], {}, [None]],
    "mapping": lambda: [None, 0, "x", [None], torch.ones(3), object()],
    "tensors": lambda: [None, {}, "x", {"x": None}, {"layers": None}, {"layers": [None]}, torch.ones(3)],
    "sites": lambda: [0, "x", [None], ["x"], {"x": None}, torch.ones(3)],
    "folders": lambda: [None, [], {}, 0, [None], [""], {"x": None}, {"": "x"}, {0: "x"}, *TEXTS, b"x"],
    "table": lambda: [None, [], {}, "x", 0, torch.ones(3)],
    "axes": lambda: [0, "x", [], {}, torch.ones(3), True],
    "inputs": lambda: [0, "x", [], torch.ones(3)],
}  # fmt: skip

PLAN = {
    "rank": "rank", "alpha": "alpha", "targets": "group", "layers": "layers", "gqa": "word",
    "acts_on": "word", "share_residual": "flag", "rules": "rules", "dtype": "dtype",
}  # fmt: skip
HUB = {"folder": "path", "revision": "text", "token": "token", "subfolder": "text"}
LOAD = {
    **HUB,
    "model": "model",
    "name": "name",
    "active": "flag",
    "freeze": "flag",
    "rules": "rules",
}

#: By function: valid arguments as expressions over `things`, and the kind of each argument; "?" allows None.
FUNCTIONS = {
    "apply": ("bare, 'cp', 2", {
        **PLAN, "model": "model", "dropout": "probability", "init": "word", "name": "name",
        "generator": "generator", "train_also": "texts", "shared": "legs", "tasks": "tasks", "freeze": "flag",
    }),
    "plan": ("bare, 'cp', 2", {
        **PLAN, "model": "model", "dropout": "probability", "init": "word", "shared": "legs",
        "tasks": "tasks", "generator": "generator", "device": "device",
    }),
    "bank": ("bare, 'cp', 2", {
        **PLAN, "model": "model", "capacity": "size", "shared": "legs", "device": "device",
    }),
    "sites": ("bare", {"model": "model", "rules": "rules"}),
    "mlp_sites": ("bare", {"model": "model"}),
    "load": ("bare, folder", LOAD),
    "load_lora": ("bare, lora", LOAD),
    "read": ("folder", HUB),
    "read_description": ("folder", HUB),
    "convert": ("folder, out", {**HUB, "out": "path"}),
    "export_lora": ("adapter, out", {
        "adapter": "adapter", "folder": "path", "model": "model?", "trained_modules": "sites?",
        "base_model": "text",
    }),
    "export_gguf": ("adapter, out", {"adapter": "adapter", "file": "path"}),
    "compress": ("bare, [folder], 'cp', 2", {
        "model": "model", "folders": "folders", "rank": "rank", "gqa": "word", "dropout": "probability",
        "rules": "rules", "tolerance": "number", "ridge": "number", "restarts": "number", "sweeps": "number",
        "generator": "generator", "progress": "function",
    }),
    "adapters": ("model", {"model": "model"}),
    "set_active": ("model, []", {"model": "model", "names": "texts"}),
    "align_to_gradient": ("model, [{}]", {
        "model": "model", "batches": "group", "loss": "function", "name": "name", "generator": "generator",
    }),
    "change_rank": ("adapter, optimizer, 3", {
        "adapter": "adapter", "optimizer": "optimizer", "rank": "rank", "generator": "generator",
    }),
    "RankSchedule": ("adapter, optimizer, {1: 3}", {
        "adapter": "adapter", "optimizer": "optimizer", "ranks": "mapping", "generator": "generator",
    }),
    "parameter_groups": ("adapter, 1e-3", {
        "adapter": "adapter", "lr": "number", "speeds": "mapping?", "modules_lr": "number?",
        "weight_decay": "number",
    }),
    "check_effect": ("adapter, {}", {"adapter": "adapter", "tolerance": "bound"}),
    "verify": ("bare, {}", {"model": "model", "sites": "sites"}),
    "BlockRule": ("'x'", {
        "match": "text", "fused": "word", "projections": "mapping", "skip": "flag", "output_offset": "word",
        "weight_read_directly": "legs?", "refuse": "text",
    }),
}  # fmt: skip

METHODS = {
    "adapter.save": ("out", {"folder": "path", "state": "mapping?", "model": "adapter?"}),
    "adapter.export_lora": ("out", {"folder": "path"}),
    "adapter.push_to_hub": ("'user/name'", {
        "repository": "path", "private": "word", "revision": "text", "token": "token", "message": "text",
        "base_model": "text", "data": "text", "scores": "mapping?", "lora": "flag", "replace_card": "flag",
    }),
    "adapter.count": ("", {"trainable_only": "flag"}),
    "adapter.network": ("adapter.groups[0]", {"group": "group"}),
    "adapter.low_rank_pair": ("adapter.sites[0]", {"site": "group"}),
    "adapter.delta": ("adapter.sites[0]", {"site": "group"}),
    "adapter.norms": ("adapter.sites[0]", {"site": "group"}),
    "adapter.base_weight": ("adapter.sites[0]", {"site": "group"}),
    "adapter.remove": ("", {"merged": "flag"}),
    "tasks.train_tasks": ("['s']", {"names": "texts?"}),
    "tasks.add_task": ("'u'", {"name": "name", "start": "word"}),
    "tasks.task": ("'s'", {"name": "group"}),
    "planned.count": ("", {"trainable_only": "flag", "shared": "flag"}),
    "planned.lora_count": ("2", {"rank": "number"}),
    "bank.add": ("'x', folder", {"name": "hashable", "source": "group"}),
    "bank.update": ("{}", {"sources": "mapping"}),
    "bank.fill": ("['x'], bank[None]", {"names": "number", "tensors": "tensors"}),
    "bank.adapter": ("None", {"name": "hashable"}),
    "bank.save": ("out", {"folder": "path"}),
    "bank.load": ("out", {"folder": "path"}),
    "compressed.table": ("'layer'", {"by": "word"}),
    "compressed.count": ("", {"trainable_only": "flag"}),
    "compressed.save": ("out", {"folder": "path"}),
}  # fmt: skip

PLOTS = {
    "layers": ("adapter", {"adapter": "adapter", "group": "word", "ax": "axes"}),
    "heads": ("adapter", {"adapter": "adapter", "matrix": "group", "group": "word", "ax": "axes"}),
    "congruence": ("net", {"net": "adapter", "other": "group?", "bond": "word", "ax": "axes"}),
    "singular_values": ("net", {"net": "adapter", "ax": "axes"}),
    "ranks": ("table", {"table": "table", "ax": "axes"}),
}

CALLS = {
    **{name: (f"nn.{name}", *rest) for name, rest in FUNCTIONS.items()},
    **{name: (name, *rest) for name, rest in METHODS.items()},
    **{f"plot.{name}": (f"plot.{name}", *rest) for name, rest in PLOTS.items()},
}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """The names that the tables use."""
    root = tmp_path_factory.mktemp("odd")
    found = {
        "nn": nn,
        "plot": plot,
        "out": Path("out"),
        "bare": small_llama(),
        "model": small_llama(),
    }
    adapter = found["adapter"] = put(found["model"])
    found["folder"], found["lora"] = adapter.save(root / "own"), adapter.export_lora(root / "lora")
    found["optimizer"] = torch.optim.SGD(adapter.parameters(), 0.1)
    found["tasks"] = put(small_llama(), tasks=["s", "t"])
    found["bank"] = nn.bank(small_llama(), "cp", 2)
    found["planned"] = nn.plan(found["bare"], "cp", 2)
    found["compressed"] = nn.compress(found["bare"], [found["folder"]], "cp", 2)
    found["net"] = decomp.cp({"layer": 3, "in": 4, "out": 5}, 2, init="normal")
    found["table"] = decomp.suggest_rank(found["net"], "tucker", (1, 2))
    return found


def refused(function, arguments):
    """Whether a call raises an error that a line of the library raises, of a kind that users catch."""
    try:
        function(**arguments)
    except (TypeError, ValueError, KeyError, OSError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return last.filename.startswith(HOME) and "raise " in last.line
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_a_wrong_kind_are_refused_and_change_nothing(
    name, things, tmp_path, monkeypatch
):
    if name.startswith("plot."):
        pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    path, valid, kinds = CALLS[name]
    function = eval(path, things)
    given = inspect.signature(function).bind(*eval(f"[{valid}]", things)).arguments
    with unchanged(things["model"]), unchanged(things["bare"]):
        for argument, kind in kinds.items():
            odds = [odd for odd in ODD[kind.rstrip("?")]() if odd is not None or "?" not in kind]
            for odd in odds:
                assert refused(function, {**given, argument: odd}), f"{argument}={odd!r}"
    assert not list(tmp_path.iterdir())
