"""What apply() can be asked for: which projections, which tensors, which decomposition."""

import pytest
import torch
from adapted import close, each_format, output, put, same_bits, unchanged
from models import FAMILIES
from strategies import generator

import lortalib
from lortalib import decomp
from lortalib.nn import sites
from lortalib.nn._forward import UpdateHook


def paths(adapter):
    return [site.path for site in adapter.sites]


# Targets


@pytest.mark.parametrize(
    ("targets", "roles"),
    [
        ("qkvo", "qkvo"),
        ("qv", "qv"),
        ("vq", "qv"),
        ("o", "o"),
        (["q", "v"], "qv"),
        ("k_proj", "k"),
        (["q_proj", "o_proj"], "qo"),
        (("o", "q_proj"), "qo"),
        ("self_attn.v_proj", "v"),
        (r".*\.self_attn\.(q|v)_proj", "qv"),
        (lambda site: site.writer, "o"),
        (lambda site: site.heads != site.query_heads, "kv"),
    ],
)
def test_targets(llama, targets, roles):
    adapter = put(llama, targets=targets)
    assert adapter.sites == [site for site in sites(llama) if site.role in roles]
    assert adapter.groups[0].roles == tuple(roles)
    assert adapter.groups[0].shape["matrix"] == len(roles)
    hooks = [hook for module in llama.modules() for hook in module._forward_hooks.values()]
    assert sum(isinstance(hook, UpdateHook) for hook in hooks) == len(adapter.sites)


def test_targets_of_full_paths(llama):
    two = ["model.layers.1.self_attn.v_proj", "model.layers.0.self_attn.q_proj"]
    adapter = put(llama, targets=two)
    assert paths(adapter) == two[::-1]
    assert adapter.groups[0].shape["layer"] == 2


@pytest.mark.parametrize(
    ("layers", "expected"), [(1, [1]), ([2, 0], [0, 2]), (range(1, 4), [1, 2, 3]), ({3}, [3])]
)
def test_layers(layers, expected):
    """A tensor has the chosen layers only; each finds its own slice."""
    family = FAMILIES["Bert"]
    model = family.model(num_hidden_layers=4)
    adapter = put(model, targets="qo", layers=layers)
    group = adapter.groups[0]
    assert group.layers == tuple(expected)
    assert [site.layer for site in adapter.sites] == [n for n in expected for _ in "qo"]
    dense = adapter.network(group).dense()
    for site in adapter.sites:
        tensor = dense[expected.index(site.layer), :, "qo".index(site.role)]
        rows = torch.cat([head.T for head in tensor])
        assert close(adapter.delta(site), rows if site.role == "q" else rows.T, 1e-6)


def test_a_predicate_can_choose_unlike_layers_of_unlike_roles(llama):
    chosen = {("q", 0), ("v", 1)}
    adapter = put(llama, targets=lambda site: (site.role, site.layer) in chosen)
    assert [(site.role, site.layer) for site in adapter.sites] == sorted(chosen)
    assert adapter.count() == 2 * (2 + 4 + 2 + 16 + 4)


# Groups: which projections share a tensor


def test_pool_shares_one_tensor_and_split_makes_two(llama):
    pool = put(llama, rank=3)
    assert [group.shape["head"] for group in pool.groups] == [4]
    assert pool.count() == 3 * (16 + 4 + 4 + 2 + 4)
    split = put(llama, rank=3, gqa="split", name="split")
    assert [(g.shape["head"], g.roles) for g in split.groups] == [(4, ("q", "o")), (2, ("k", "v"))]
    assert split.count() == 3 * (16 + 4 + 4 + 2 + 2) + 3 * (16 + 4 + 2 + 2 + 2)


def test_stacks_of_unlike_width_have_tensors_of_their_own():
    model = FAMILIES["CLIP"].model()
    adapter = put(model)
    shapes = [(g.shape["in"], g.shape["out"], g.shape["head"]) for g in adapter.groups]
    assert shapes == [(24, 6, 4), (16, 4, 4)]
    assert list(adapter.networks) == [group.name for group in adapter.groups]
    assert len(set(adapter.networks)) == 2


def test_stacks_of_one_width_do_not_share():
    adapter = put(FAMILIES["T5"].model())
    assert [group.sites[0].stack for group in adapter.groups] == list(FAMILIES["T5"].stacks)
    assert len({id(network) for network in adapter.networks.values()}) == 3


@pytest.mark.parametrize("gqa", ["pool", "split"])
def test_every_parameter_is_owned_once(llama, gqa):
    adapter = put(llama, gqa=gqa)
    own = list(adapter.parameters())
    assert len({id(p) for p in own}) == len(own)
    assert sum(p.numel() for p in own) == adapter.count()
    in_model = [p for name, p in llama.named_parameters() if name.startswith("lortalib.default.")]
    assert [id(p) for p in in_model] == [id(p) for p in own]


# Decompositions

LINE = "in p, layer matrix p q, head out q"


def shape_and_rank(shape, rank):
    return decomp.cp(shape, rank, init="normal")


def shape_only(shape):
    return decomp.network(LINE, shape, {"p": 3, "q": 2}, init="normal")


def everything(shape, rank, *, init, generator, device, dtype):
    return decomp.tt(shape, rank, init=init, generator=generator, device=device, dtype=dtype)


class Callable:
    """An object that is asked for a network."""

    name = "mine"

    def __call__(self, shape, rank, **options):
        return decomp.tucker(shape, rank, **options)


@pytest.mark.parametrize(
    ("decomposition", "line", "name"),
    [
        ("cp", "in r, out r, head r, layer r, matrix r", "cp"),
        ("LoRTA", "in r, out r, head r, layer r, matrix r", "cp"),
        ("lora-xs", "layer matrix in p (frozen), layer matrix p q, ", "lora_xs"),
        (decomp.tt, "in a, layer a b, matrix b c, head c d, out d", "tt"),
        (decomp.formats["ring"], "in e a, layer a b, matrix b c, head c d, out d e", "ring"),
        (LINE, LINE, LINE),
        (shape_and_rank, "in r, out r, head r, layer r, matrix r", "shape_and_rank"),
        (shape_only, LINE, "shape_only"),
        (everything, "in a, layer a b, matrix b c, head c d, out d", "everything"),
        (Callable(), "in p, out q, head s, layer t, matrix u, p q s t u", "mine"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__)[:12],
)
def test_decompositions(llama, decomposition, line, name):
    inputs = FAMILIES["Llama"].inputs()
    before = output(llama, inputs)
    adapter = put(llama, decomposition, 2)
    network = adapter.network(adapter.groups[0])
    assert str(network.legs).startswith(line)
    assert adapter.config.decomposition == name
    assert adapter.config.decomposition in repr(adapter)
    assert not close(output(llama, inputs), before, 1e-3)


def test_a_callable_may_order_the_modes_as_it_likes(llama):
    def reordered(shape, rank):
        return decomp.cp(dict(sorted(shape.items())), rank, init="normal", generator=generator(1))

    adapter, usual = put(llama, reordered), put(llama, name="b", seed=1)
    assert adapter.network(adapter.groups[0]).modes == ("head", "in", "layer", "matrix", "out")
    assert all(close(adapter.delta(s), usual.delta(s), 1e-6) for s in adapter.sites)


def test_a_callable_is_asked_for_each_group(llama):
    asked = []

    def noted(shape, rank):
        asked.append(dict(shape))
        return decomp.cp(shape, rank)

    put(llama, noted, 2, gqa="split")
    both = {"layer": 2, "matrix": 2, "in": 16, "out": 4}
    assert asked == [{**both, "head": 4}, {**both, "head": 2}]


def test_a_rank_may_be_a_tuple_or_a_mapping(llama):
    by_bond = put(llama, LINE, {"q": 2, "p": 3})
    listed = put(llama, LINE, (3, 2), name="b")
    assert by_bond.network(by_bond.groups[0]).ranks == {"p": 3, "q": 2}
    assert listed.network(listed.groups[0]).ranks == {"p": 3, "q": 2}


def test_a_registered_format_can_be_used_at_once(llama):
    decomp.register_format("one_matrix", "layer matrix in head out", "nothing is compressed")
    try:
        adapter = put(llama, "one_matrix")
        assert adapter.count() == 2 * 4 * 16 * 16
        expected = output(llama, FAMILIES["Llama"].inputs())
        adapter.merge()
        assert close(output(llama, FAMILIES["Llama"].inputs()), expected)
    finally:
        del decomp.formats["one_matrix"]


@each_format
def test_the_generator_decides_the_start(decomposition):
    def start(seed):
        model = FAMILIES["Bert"].model()
        adapter = put(model, decomposition, init="invariant", seed=seed)
        return list(adapter.parameters())

    assert all(map(same_bits, start(1), start(1)))
    assert not all(map(same_bits, start(1), start(2)))


def test_apply_with_a_generator_leaves_the_global_one(llama):
    before = torch.get_rng_state()
    lortalib.nn.apply(llama, generator=generator(3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_factors_have_the_dtype_asked_for(llama, dtype):
    adapter = put(llama.to(torch.bfloat16), dtype=dtype)
    assert {p.dtype for p in adapter.parameters()} == {dtype}
    assert output(llama, FAMILIES["Llama"].inputs()).dtype == torch.bfloat16


def test_float32_is_the_default(llama):
    adapter = lortalib.nn.apply(llama.to(torch.float16))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_sites_changes_nothing(llama):
    with unchanged(llama):
        sites(llama)


def test_a_callable_may_name_its_arguments_as_it_likes(llama):
    adapter = lortalib.nn.apply(llama, lambda s, r: decomp.cp(s, r), rank=3)
    assert [network.ranks for network in adapter.networks.values()] == [{"r": 3}]


# Words of other libraries


@pytest.mark.parametrize("targets", ["all-linear", r".*_proj", ["qkvo", "mlp"]])
def test_attention_and_mlp_in_words_of_peft(llama, targets):
    if isinstance(targets, list):  # a list holds names, so these fit nothing
        with unchanged(llama), pytest.raises(ValueError, match="target 'qkvo' fits no projection"):
            put(llama, targets=targets)
        return
    everything = put(llama, targets="all")
    sites = everything.sites
    everything.remove()
    assert put(llama, targets=targets).sites == sites


def test_one_name_is_looked_for_in_the_mlp_too(llama):
    adapter = put(llama, targets="down_proj")
    assert {site.role for site in adapter.sites} == {"down"}


@pytest.mark.parametrize("pattern", ["(", r"no\.such\..*", "self_attn.*"])
def test_a_pattern_that_fits_no_whole_path_is_refused(llama, pattern):
    with unchanged(llama), pytest.raises(ValueError, match="one regular expression"):
        put(llama, targets=pattern)


@pytest.mark.parametrize("call", [lortalib.nn.apply, lortalib.nn.plan])
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("r", "called rank"),
        ("lora_alpha", r"alpha=lora_alpha / r"),
        ("lora_dropout", "called dropout"),
        ("target_modules", "called targets"),
        ("modules_to_save", "train_also"),
        ("layers_to_transform", "called layers"),
        ("use_dora", "DoRA"),
        ("use_rslora", "nothing is divided"),
        ("init_lora_weights", "called init"),
    ],
)
def test_words_of_a_lora_are_explained(llama, call, word, message):
    with unchanged(llama), pytest.raises(TypeError, match=rf"\(\) has no {word}=: .*{message}"):
        call(llama, "cp", **{word: 8})


def test_an_unknown_word_is_pythons_own_error(llama):
    with unchanged(llama), pytest.raises(TypeError, match="unexpected keyword argument 'rnak'"):
        lortalib.nn.apply(llama, rnak=8)
