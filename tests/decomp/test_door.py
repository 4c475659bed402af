"""What the door of lortalib.decomp loads, shows and warns about."""

import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import lortalib
from lortalib import decomp

SHIPPED = [
    "block_term", "cara", "cp", "cp_matrix", "fact_tk", "folded_cp", "indscal", "jd", "jd_diag",
    "lora", "lora_xs", "loretta", "lotr", "metatt_41d", "metatt_4d", "rescal", "ring", "tt",
    "tt_lora", "tucker", "uni_lora", "vera",
]  # fmt: skip


def test_tensor_work_loads_neither_transformers_nor_tensorly():
    code = """
import sys, torch
from lortalib import decomp
net = decomp.tucker((2, 2, 2, 4, 4), 2, init="normal")
net.select({"in": 0}, layer=1).dense(), net.cut("layer", "matrix"), repr(net), dir(decomp)
decomp.direct_sum([net, net])
decomp.lora(net.shape, 2, init=decomp.start_along(net.dense().detach()))
try:
    decomp.nothing
except AttributeError:
    pass
heavy = {"transformers", "tensorly", "peft", "accelerate", "scipy"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
decomp.Fit, decomp.fit, decomp.to_tensorly, decomp.from_tensorly
print("tensorly" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[]", "True False"]


def test_every_format_that_ships_comes_up_by_tab():
    assert sorted(decomp.formats) == SHIPPED
    assert set(SHIPPED) < set(dir(decomp))
    assert set(decomp.__all__) < set(dir(decomp))
    assert all(getattr(decomp, name) is not None for name in decomp.__all__)
    for name in SHIPPED:
        assert inspect.signature(getattr(decomp, name)).parameters.keys() >= {
            "shape", "rank", "init", "generator", "device", "dtype"
        }  # fmt: skip
        assert getattr(decomp, name)((2, 2, 2, 4, 4) if name != "metatt_41d" else
            {"layer": 2, "task": 2, "matrix": 2, "in": 4, "out": 4}, 1).count()  # fmt: skip


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match=r"module 'lortalib.decomp' has no attribute 'nope'"):
        decomp.nope  # noqa: B018


# --- where the warning of a cut rank points -------------------------------------------------------

SHAPE = {"layer": 2, "in": 4, "out": 4}


def model():
    return BertModel(
        BertConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    )


CALLS = {
    "cp": lambda: decomp.cp({"in": 4, "out": 4}, 9),
    "tucker": lambda: decomp.tucker(SHAPE, 9),
    "tt": lambda: decomp.tt(SHAPE, 9),
    "lora": lambda: decomp.lora({**SHAPE, "matrix": 1}, 9),
    "a format": lambda: decomp.get_format("lotr")({**SHAPE, "matrix": 2}, 99),
    "a line": lambda: decomp.network("in p, layer p q, out q", SHAPE, 9),
    "a name": lambda: decomp.network("tt", SHAPE, 9),
    "Format": lambda: decomp.Format("", "", "in p, layer p q, out q")(SHAPE, 9),
    "decompose": lambda: decomp.fit(torch.ones(2, 4, 4), "tt", 9, modes="layer in out"),
    "apply": lambda: lortalib.nn.apply(model(), "tucker", rank=9),
    "apply, a line": lambda: lortalib.nn.apply(model(), "in p, layer matrix p q, head out q", rank=99),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_warning_of_a_cut_rank_points_at_the_line_of_the_caller(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CALLS[name]()
    cut = [w for w in caught if "ranks larger than the modes can fill were cut" in str(w.message)]
    line = CALLS[name].__code__.co_firstlineno
    assert [(w.filename, w.lineno) for w in cut] == [(__file__, line)] * max(1, len(cut))


def test_a_caller_whose_folder_begins_like_the_library_is_no_part_of_it():
    """A file beside the library, such as lortalib_user.py, is the caller."""
    path = str(Path(lortalib.__file__).parent) + "_user.py"
    scope = {"decomp": decomp, "SHAPE": SHAPE}
    with pytest.warns(UserWarning, match="ranks larger") as caught:
        exec(compile("decomp.tt(SHAPE, 9)", path, "exec"), scope)
    assert caught[0].filename == path
