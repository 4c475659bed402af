"""sites(): what is found in each family, on any device, and what is refused."""

import pytest
import torch
import transformers
from models import BERT, FAMILIES, Attention, each_family
from packaging.version import Version
from torch import nn

from lortalib.nn import UnsupportedModelError, apply, sites
from lortalib.nn._anatomy.names import role_of


@each_family
def test_sites_are_those_of_the_config(family):
    if family.name == "ViT" and Version(transformers.__version__) < Version("5.9"):
        pytest.skip("older transformers call ViT's layers encoder.layer")
    found = sites(family.model())
    assert list(dict.fromkeys(site.stack for site in found)) == list(family.stacks)
    for stack, sizes in family.stacks.items():
        here = [site for site in found if site.stack == stack]
        assert [(s.layer, s.role) for s in here] == [
            (layer, role) for layer in range(sizes.layers) for role in "qkvo"
        ]
        for site in here:
            own_heads = sizes.kv_heads if site.role in "kv" else sizes.heads
            assert (site.heads, site.query_heads) == (own_heads, sizes.heads)
            assert (site.head_dim, site.width) == (sizes.head_dim, sizes.width)
            assert site.writer == (site.role == "o")


@each_family
def test_a_site_leads_to_its_projection(family):
    model = family.model()
    found = sites(model)
    assert len({site.key for site in found}) == len({site.path for site in found}) == len(found)
    for site in found:
        projection = model.get_submodule(site.path)
        assert site.transposed != isinstance(projection, nn.Linear)
        assert tuple(projection.weight.shape) == site.weight_shape
        assert site.path.startswith(site.stack.split(".")[0]) or site.stack == "layers"
        assert f".{site.layer}." in site.path


@each_family
def test_meta_device_gives_the_same_sites(family):
    with torch.device("meta"):
        on_meta = family.model()
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert sites(on_meta) == sites(family.model())


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.head])
def test_a_head_on_top_changes_paths_only(name):
    family = FAMILIES[name]
    bare, headed = sites(family.model()), sites(family.model(family.head))
    assert [site.key for site in bare] == [site.key for site in headed]
    assert all(long.path.endswith(short.path) for short, long in zip(bare, headed))


def test_one_tower_alone_is_named_as_inside_the_whole():
    encoder = transformers.T5EncoderModel(transformers.T5Config(**FAMILIES["T5"].sizes))
    whole = sites(FAMILIES["T5"].model("ForConditionalGeneration"))
    assert [s.key for s in sites(encoder)] == [s.key for s in whole if s.stack == "encoder"]


def test_layers_are_counted_beyond_nine_and_in_order():
    found = sites(FAMILIES["Bert"].model(num_hidden_layers=12))
    assert [site.layer for site in found if site.role == "q"] == list(range(12))
    assert all(f".{site.layer}." in site.path for site in found)


def test_one_layer_is_layer_zero():
    assert {site.layer for site in sites(FAMILIES["Llama"].model(num_hidden_layers=1))} == {0}


@pytest.mark.parametrize(
    "names",
    [
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        ("query", "key", "value", "dense"),
        ("Wq", "Wk", "Wv", "Wo"),
        ("linear_q", "linear_k", "linear_v", "linear_out"),
        ("q_lin", "k_lin", "v_lin", "out_lin"),
        ("to_q", "to_k", "to_v", "to_out"),
        ("q", "k", "v", "o"),
    ],
    ids=lambda names: names[0] + "," + names[3],
)
def test_names_of_many_hands_are_read(names):
    model = nn.Sequential(Attention(names), Attention(names))
    assert [(s.layer, s.role) for s in sites(model)] == [(n, r) for n in (0, 1) for r in "qkvo"]
    assert [s.path for s in sites(model)][:4] == [f"0.{name}" for name in names]


def test_a_projection_is_seen_through_one_wrapper():
    model = Attention(("to_q", "to_k", "to_v"))
    model.to_out = nn.Sequential(nn.Linear(16, 16), nn.Dropout())
    assert sites(model)[3].path == "to_out.0"


@pytest.mark.parametrize(
    ("names", "role"),
    [
        ("q q_proj query query_proj q_lin to_q Wq linear_q q_linear proj_q query_layer", ("q", ())),
        ("k k_proj key key_proj k_lin to_k Wk linear_k k_linear keys", ("k", ())),
        ("v v_proj value value_proj v_lin to_v Wv linear_v v_linear values", ("v", ())),
        ("o o_proj out_proj out_lin to_out Wo dense output proj c_proj linear_out", ("o", ())),
        ("qkv qkv_proj query_key_value Wqkv c_attn in_proj att_proj", ("qkv", ())),
        ("kv kv_proj to_kv key_value keys_values", ("kv", ())),
        ("q_a_proj", ("q", ("a",))),
        ("kv_a_proj_with_mqa", ("kv", ("a", "with", "mqa"))),
        ("query_global", ("q", ("global",))),
        ("gate_proj up_proj fc1 norm quick router", None),
    ],
)
def test_role_of_names(names, role):
    assert {name: role_of(name) for name in names.split()} == dict.fromkeys(names.split(), role)


# What is refused


def fused(name, **sizes):
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}Model")(config)


REFUSED = {
    "plain layers": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        "no attention was found in Sequential.*q, k and v.*saw 0, 1",
    ),
    "a convolutional network": (
        lambda: fused("ResNet", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1]),
        "no attention was found in ResNetModel.*q_proj, query.*saw embedder, encoder, pooler",
    ),
    "nothing at all": (lambda: nn.Module(), "saw no submodules"),
    "grouped convolutions": (
        lambda: fused("SqueezeBert", **BERT, embedding_size=BERT["hidden_size"]),
        r"of 2 attention blocks in SqueezeBertModel, 2 were not understood(.|\n)*layers\.0\.attention "
        r"\(SqueezeBertSelfAttention\): it holds query\.weight",
    ),
    "heads that do not divide": (
        lambda: Attention(heads=3),
        "queries are 16 wide, which 3 heads do not divide",
    ),
    "no head count": (lambda: Attention(heads=None), "it states no head count"),
    "an unlike head_dim": (
        lambda: _with(Attention(), head_dim=8),
        "16 wide, which is not 4 heads of 8 components",
    ),
    "no output projection": (
        lambda: Attention(("q_proj", "k_proj", "v_proj")),
        "no output projection was recognised",
    ),
    "an output that reads something else": (
        lambda: Attention(o_proj=(24, 16)),
        "output projection reads 24 features, which is not 4 heads",
    ),
    "keys that are no heads": (
        lambda: Attention(k_proj=(16, 12)),
        "4 query heads of 4 components do not fit keys of width 12",
    ),
}


def _with(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_was_looked_for_and_seen(case):
    make, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        sites(make())


def test_a_model_that_is_understood_in_part_is_refused_whole():
    model = nn.ModuleDict({"good": Attention(), "bad": Attention(heads=3)})
    with pytest.raises(
        UnsupportedModelError, match=r"of 2 attention blocks .*, 1 were not(.|\n)*  bad \("
    ):
        apply(model)
    assert not hasattr(model, "lortalib")


def test_a_long_list_of_refusals_is_cut():
    many = fused(
        "SqueezeBert", **{**BERT, "num_hidden_layers": 8, "embedding_size": BERT["hidden_size"]}
    )
    with pytest.raises(UnsupportedModelError, match=r"\.\.\. and 3 more"):
        sites(many)


def test_config_counts_heads_where_the_module_does_not():
    model = FAMILIES["Bert"].model()
    for module in model.modules():
        vars(module).pop("num_attention_heads", None)
        vars(module).pop("attention_head_size", None)
    assert {site.heads for site in sites(model)} == {BERT["num_attention_heads"]}


def test_a_projection_cannot_have_two_roles():
    model = nn.ModuleDict({"one": Attention(), "two": Attention()})
    model["two"].q_proj = model["one"].q_proj
    assert len(sites(model)) == 7  # one module that hangs in two places is one site
    model["two"].q_proj = model["one"].v_proj
    with pytest.raises(
        UnsupportedModelError, match=r"two \(Attention\): one\.v_proj would have the roles v, q"
    ):
        sites(model)
