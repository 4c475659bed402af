"""Bad input: each gives an error that says what was asked and found, and nothing is changed."""

import pytest
import torch
from adapted import output, picture, put, same_bits, unchanged, weight
from hypothesis import example, given
from hypothesis import strategies as st
from models import FAMILIES
from strategies import examples

import lortalib
from lortalib import decomp
from lortalib.nn import UnsupportedModelError, adapters, apply

LINE = "in p, layer matrix p q, head out q"


def wrong_shape(shape, rank):
    return decomp.cp({**shape, "out": shape["out"] + 1}, rank)


def second_group_fails(shape, rank):
    if shape["head"] == 2:
        raise RuntimeError("no luck")
    return decomp.cp(shape, rank)


BAD = {
    # ranks
    "rank 0": ({"rank": 0}, r"rank of bond 'r' must be an integer >= 1; found 0"),
    "negative rank": ({"rank": -3}, r"must be an integer >= 1; found -3"),
    "boolean rank": ({"rank": True}, r"must be an integer >= 1; found True"),
    "fractional rank": ({"rank": 2.0}, r"must be an integer >= 1; found 2\.0"),
    "no rank": ({"rank": None}, r"must be an integer >= 1; found None"),
    "rank as text": ({"rank": "8"}, r"must be an integer >= 1; found '8'"),
    "too many ranks": (
        {"decomposition": LINE, "rank": (2, 2, 2)},
        r"3 ranks were given, \(2, 2, 2\); the bonds are p, q",
    ),
    "rank 0 in a tuple": ({"decomposition": LINE, "rank": (2, 0)}, r"bond 'q' must .* found 0"),
    "unknown bond": ({"decomposition": LINE, "rank": {"p": 2, "x": 2}}, r"p, x; .* are p, q"),
    # targets and layers
    "empty string": ({"targets": ""}, r"targets='' .* choose none of the 8 projections"),
    "empty list": ({"targets": []}, r"targets=\[\] .* nothing to train"),
    "predicate without effect": ({"targets": lambda site: False}, r"choose none of the 8"),
    "unknown letter": ({"targets": "qx"}, r"target 'qx' fits no projection.*q_proj"),
    "layers in words": ({"layers": "all"}, "layers must be integers, or None for all"),
    "no targets": ({"targets": None}, "targets must be letters, names or a function"),
    "unknown name": ({"targets": ["q", "w_proj"]}, r"target 'w_proj' .*'qkvo'.*v_proj"),
    "part of a name": ({"targets": ["proj"]}, r"target 'proj' fits no projection"),
    "unknown layer": ({"layers": [0, 7]}, r"layers \[7\] do not exist.* layers \[0, 1\]"),
    "negative layer": ({"layers": -1}, r"layers \[-1\] do not exist"),
    "no layers": ({"layers": []}, r"layers=\[\] choose none"),
    "layer without the target": (
        {"targets": ["layers.0.self_attn.q_proj"], "layers": 1},
        r"choose none of the 14 projections",
    ),
    # names
    "empty name": ({"name": ""}, r"non-empty string without dots; found ''"),
    "dotted name": ({"name": "a.b"}, r"without dots; found 'a\.b'"),
    "a word torch needs": ({"name": "parameters"}, r"'parameters' is no possible name"),
    "number as name": ({"name": 3}, r"non-empty string without dots; found 3"),
    # numbers
    "dropout 1": ({"dropout": 1.0}, r"dropout must be at least 0 and below 1; found 1\.0"),
    "negative dropout": ({"dropout": -0.1}, r"dropout must .* found -0\.1"),
    "dropout NaN": ({"dropout": float("nan")}, r"dropout must .* found nan"),
    "dropout as text": ({"dropout": "0.1"}, r"dropout must .* found '0\.1'"),
    "alpha 0": ({"alpha": 0}, r"alpha must be a finite number other than 0; found 0"),
    "alpha infinite": ({"alpha": float("inf")}, r"alpha must .* found inf"),
    "alpha NaN": ({"alpha": float("nan")}, r"alpha must .* found nan"),
    "no alpha": ({"alpha": None}, r"alpha must .* found None"),
    # choices
    "gqa": ({"gqa": "mean"}, r"gqa must be 'pool' or 'split'; found 'mean'"),
    "init": ({"init": "zeros"}, r"unknown init 'zeros'; choose 'invariant', 'lorta', 'normal'"),
    "init number": ({"init": 0}, r"unknown init 0"),
    "layers, a fraction": ({"layers": 0.5}, r"layers must be integers.*found 0\.5"),
    # decompositions
    "misspelt": ({"decomposition": "tuker"}, r"'tuker' \(did you mean 'tucker'"),
    "number": ({"decomposition": 3}, r"a name, a line of legs or a callable; found 3"),
    "line without out": ({"decomposition": "in r, head layer matrix r"}, r"carries .*out"),
    "line with a task": ({"decomposition": f"task p, {LINE}"}, r"'task p, in p.*tasks="),
    "a format of several tasks": ({"decomposition": "metatt_41d"}, r"'?task"),
    "wrong shape": ({"decomposition": wrong_shape}, r"asked for .*'out': 4.* and returned .*'out': 5"),
    "no network": ({"decomposition": lambda shape: None}, r"returned no Network but None"),
    "all frozen": ({"decomposition": "in r (frozen), head out layer matrix r (frozen)"}, "frozen"),
    # train_also
    "train_also unknown": ({"train_also": ["klassifier"]}, r"'klassifier' fits no module.*lm_head"),
    "train_also empty name": ({"train_also": [""]}, r"train_also='' fits no module"),
    "train_also without numbers": ({"train_also": ["act_fn"]}, r"act_fn' has no parameters"),
    "train_also with sites": (
        {"train_also": ["self_attn"]},
        r"holds the adapted projection 'model\.layers\.0\.self_attn\.q_proj'",
    ),
    "train_also is a site": ({"train_also": ["layers.0.self_attn.o_proj"]}, r"not both"),
}  # fmt: skip


@pytest.mark.parametrize("beside_another", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_of_apply(llama, case, beside_another):
    options, message = BAD[case]
    if beside_another:
        put(llama, name="other").merge()
    with unchanged(llama), pytest.raises(ValueError, match=message):
        apply(llama, **{"decomposition": "cp", **options})
    apply(llama, "cp")


def test_a_name_that_is_in_use(llama):
    put(llama, name="mine")
    with unchanged(llama), pytest.raises(ValueError, match=r"already has an adapter called 'mine'"):
        put(llama, name="mine", targets="q")
    adapters(llama)["mine"].remove()
    put(llama, name="mine")


@given(name=st.text(max_size=8) | st.sampled_from([*dir(torch.nn.ModuleDict()), "model", "base"]))
@example(name="training")
@example(name="model")
@example(name="adapters")
@examples(150)
def test_any_name_works_or_is_refused(name):
    model = FAMILIES["Bert"].model(num_hidden_layers=1)
    with unchanged(model):
        try:
            adapter = apply(model, rank=1, name=name)
        except ValueError as error:
            assert "name" in str(error)  # noqa: PT017
        else:
            assert adapters(model) == {name: adapter}
            adapter.remove()


def test_train_also_means_the_model_and_not_other_adapters(llama):
    put(llama, name="other")
    with unchanged(llama), pytest.raises(ValueError, match="'networks' fits no module"):
        apply(llama, train_also=["networks"])


def test_a_callable_that_fails_at_its_second_tensor(llama):
    with unchanged(llama), pytest.raises(RuntimeError, match="no luck"):
        apply(llama, second_group_fails, gqa="split")


def test_a_model_that_is_not_understood():
    model = FAMILIES["Bert"].model()
    model.encoder.layer[1].attention.self.num_attention_heads = 3
    with (
        unchanged(model),
        pytest.raises(UnsupportedModelError, match=r"layer\.1\.attention\.self \(BertSelf"),
    ):
        apply(model)


def test_an_attribute_of_that_name(llama):
    llama.lortalib = "mine"
    with unchanged(llama), pytest.raises(ValueError, match="has an attribute 'lortalib'"):
        apply(llama)


# Merging


def spoil(adapter, value, tensors=1):
    with torch.no_grad():
        for parameter in list(adapter.parameters())[-tensors:]:
            parameter.view(-1)[0] = value


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merging_a_factor_that_is_not_finite(llama, value, active):
    adapter = put(llama)
    spoil(adapter, value)
    if not active:
        adapter.disable()
    message = r"factor 'matrix_r' of network 'layers' holds NaN or infinity.*'default'.*nothing was"
    with unchanged(llama), pytest.raises(ValueError, match=message):
        adapter.merge()
    with unchanged(llama), pytest.raises(ValueError, match=message):
        adapter.remove(merged=True)
    assert adapter.active is active
    adapter.remove()


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("beside_another", [False, True])
def test_merging_beyond_the_range_of_float16(llama, active, beside_another):
    llama.half()
    inputs = FAMILIES["Llama"].inputs()
    if beside_another:
        put(llama, name="other", seed=1).merge()
    before = output(llama, inputs)
    adapter = put(llama)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(50)
    if not active:
        adapter.disable()
    message = r"NaN or infinity into model\.layers\.0\.self_attn\.\w_proj \(torch\.float16\)"
    with unchanged(llama), pytest.raises(ValueError, match=message):
        adapter.merge()
    with unchanged(llama), pytest.raises(ValueError, match=message):
        adapter.remove(merged=True)
    assert (adapter.merged, adapter.active) == (False, active)
    adapter.disable()
    assert same_bits(output(llama, inputs), before)


def test_what_overflows_float16_can_be_merged_in_float32(llama):
    adapter = put(llama.half())
    spoil(adapter, 1e6)
    with unchanged(llama), pytest.raises(ValueError, match="or merge into a wider dtype"):
        adapter.merge()
    llama.float()
    adapter.merge()
    assert adapter.merged


def test_overflow_in_a_late_layer_restores_the_early_ones(llama):
    llama.half()
    adapter = put(llama, "lora", gqa="split")
    before = [weight(llama, site).clone() for site in adapter.sites]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter[-1, -1].mul_(1e4)
    with unchanged(llama), pytest.raises(ValueError, match=r"into model\.layers\.1\."):
        adapter.merge()
    assert all(same_bits(weight(llama, s), old) for s, old in zip(adapter.sites, before))


def test_a_base_that_is_not_finite_is_not_the_adapters_fault(llama):
    adapter = put(llama)
    with torch.no_grad():
        weight(llama, adapter.sites[0])[0, 0] = float("inf")
    look = [weight(llama, site).clone() for site in adapter.sites]
    adapter.merge()
    adapter.unmerge()
    assert all(same_bits(weight(llama, s), old) for s, old in zip(adapter.sites, look))


class Quantised(torch.nn.Linear):
    """A projection whose weight is stored as integers, as quantised linear layers store it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        del self.weight
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        integers = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(integers, requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale)


def test_a_quantised_base_is_adapted_but_not_merged(llama):
    attention = llama.model.layers[1].self_attn
    attention.q_proj = Quantised(attention.q_proj)
    inputs = FAMILIES["Llama"].inputs()
    before = output(llama, inputs)
    adapter = put(llama)
    assert not same_bits(output(llama, inputs), before)
    message = r"weight of model\.layers\.1\.self_attn\.q_proj is quantised \(torch\.int8\)"
    with unchanged(llama), pytest.raises(ValueError, match=message):
        adapter.merge()
    adapter.remove()
    assert same_bits(output(llama, inputs), before)


def test_errors_leave_no_host_behind(llama):
    look = picture(llama).keys()
    for options, _ in BAD.values():
        with pytest.raises(ValueError, match=" "):
            apply(llama, **options)
    assert picture(llama).keys() == look
    assert lortalib.nn.adapters(llama) == {}


@pytest.mark.parametrize("model", ["gpt2", None, 3])
def test_what_is_no_model(model):
    for call in (apply, lortalib.nn.sites, lortalib.nn.mlp_sites):
        with pytest.raises(TypeError, match=r"expected a model, a torch\.nn\.Module"):
            call(model)


def test_what_is_no_model_is_named_by_its_type(llama):
    with pytest.raises(TypeError, match=r"found an object of the type LlamaConfig\. Load it first"):
        apply(llama.config)


@pytest.mark.parametrize("dtype", ["float32", torch.int8, None])
def test_a_dtype_that_cannot_train(llama, dtype):
    with unchanged(llama), pytest.raises(TypeError, match=r"floating-point torch\.dtype"):
        apply(llama, dtype=dtype)
