"""The ranks that a budget of trainable parameters buys on a model."""

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, LAW_FAMILIES, LLAMA
from strategies import examples
from transformers import LlamaConfig

import lortalib
from lortalib.decomp import budget, formats
from lortalib.nn import plan

SQUARE = {"layer": 3, "matrix": 2, "in": 8, "out": 8}


@examples(25)
@given(
    family=st.sampled_from([*LAW_FAMILIES.values(), FAMILIES["Bart"]]),
    numbers=st.integers(1, 4000),
    targets=st.sampled_from(["qkvo", "qv", "all"]),
    gqa=st.sampled_from(["pool", "split"]),
)
def test_each_row_is_met_from_below_by_the_plan_of_its_ranks(family, numbers, targets, gqa):
    """Against the networks themselves, also where several of unlike shapes share the budget."""
    model = family.model()
    options = {"targets": targets, "gqa": gqa}
    table = plan(model, numbers=numbers, **options)
    assert {row.format for row in table} | set(table.refused) == set(formats)
    assert not {row.format for row in table} & set(table.refused)
    assert [r.parameters for r in table] == sorted((r.parameters for r in table), reverse=True)
    for row in table:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ranks larger than the modes can fill")
            assert counted(model, row.format, row.rank, **options) == row.parameters <= numbers
            if isinstance(row.rank, int):
                more = counted(model, row.format, row.rank + 1, **options)
                assert more > numbers or more == row.parameters


def counted(model, line, rank, **options):
    return plan(model, line, rank, device="meta", **options).count()


def test_the_ranks_of_a_table_are_those_that_apply_takes(llama):
    row = plan(llama, ["tt"], numbers=500)[0]
    assert lortalib.nn.apply(llama, row.format, row.rank).count() == row.parameters


def test_a_configuration_is_enough(llama):
    config = LlamaConfig(**LLAMA)
    assert plan(config, "cp", 2).count() == plan(llama, "cp", 2).count()
    assert plan(config, numbers=900) == plan(llama, numbers=900)


def test_one_impossible_format_does_not_stop_the_table(llama):
    line = "in r, head out r, layer matrix r"
    table = plan(llama, ["lora", "indscal", line, "uni_lora", "cp"], numbers=100)
    assert {row.format for row in table} == {"cp", "indscal", line}
    assert "trainable parameters at rank 1" in table.refused["lora"]
    assert "any number" in table.refused["uni_lora"]
    assert "lora: has" in repr(table)


def test_acts_on_is_for_all_formats(llama):
    table = plan(llama, ["cp", "indscal"], numbers=1000, acts_on="stream")
    assert {row.format for row in table} == {"cp", "indscal"}
    weights = plan(llama, ["cp", "indscal"], numbers=1000, acts_on="weights")
    assert [row.format for row in weights] == ["cp"]
    assert "indscal" in weights.refused


def test_a_budget_of_several_shapes_shares_the_ranks():
    one, two = {"layer": 3, "in": 8, "out": 4}, {"layer": 2, "in": 6, "out": 5}
    line = "in r, layer r, out r"
    found = budget([one, two], 100, [line])[0]
    assert (found.rank, found.parameters) == ({"r": 3}, 3 * (15 + 13))
    assert budget([SQUARE], 500).rows == budget(SQUARE, 500).rows
    unlike = budget([SQUARE, {**SQUARE, "expert": 2}], 2000, ["cp", "tt"])
    assert {type(row.rank) for row in unlike} <= {int, dict}


def test_what_cannot_be_asked(llama):
    for options, says in (
        ({"rank": 3}, "leave out rank"),
        ({"share_residual": True}, "leave out rank, share_residual and shared"),
        ({"shared": ("in",)}, "leave out rank"),
        ({"decomposition": [len]}, "a name, a line of legs or a list"),
        ({"decomposition": len}, "a name, a line of legs or a list"),
        ({"decomposition": ["cp", "nonsense"]}, "unknown decomposition 'nonsense'"),
        ({"numbers": 0}, "1 or more"),
    ):
        with pytest.raises(ValueError, match=says):
            plan(llama, **{"numbers": 100, **options})
    with pytest.raises(ValueError, match="at least one shape"):
        budget([], 100)
    with pytest.raises(TypeError, match="expected a model"):
        plan("name", numbers=100)
