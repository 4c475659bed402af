"""Tensors on the residual stream: the weights that they stand for, in every door and beside others."""

import copy

import peft
import pytest
import torch
import transformers
from adapted import FORMATS, close, output, put, same_bits, unchanged
from models import BERT, IMAGE, LAW_FAMILIES, image_and_words, words
from torch.func import functional_call
from updates import dense_tensor

import lortalib
from lortalib import decomp
from lortalib.decomp import LegsError
from lortalib.nn import UnsupportedModelError
from lortalib.peft import LortaConfig

STREAM_FORMATS = [*FORMATS, "indscal", "rescal"]
DENSE = [name for name in LAW_FAMILIES if name != "experts"]


def base(family, dtype=torch.float64):
    """A tiny model, with biases that are not zero."""
    model = LAW_FAMILIES[family].model().to(dtype)
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=source, dtype=dtype) / 10)
    return model


def on(model, decomposition="indscal", targets="all", dtype=None, **options):
    options = {"targets": targets, "acts_on": "stream", "dtype": dtype or model.dtype, **options}
    return put(model, decomposition, **options)


def by_definition(adapter, model):
    """The changed weights by name: readers read x + x S and writers write y + y S, slice by slice."""
    changed = {}
    for group in adapter.groups:
        tensor = dense_tensor(adapter.network(group)) * adapter.scaling
        modes = adapter.network(group).modes
        for site in group.sites:
            at = {"layer": group.layers.index(site.layer), "matrix": group.roles.index(site.role)}
            slices = tensor[tuple(at.get(mode, slice(None)) for mode in modes)]
            if site.experts:
                slices = slices.movedim(
                    modes.index("expert") - sum(modes.index(m) < modes.index("expert") for m in at),
                    0,
                )
            weight = model.get_submodule(site.path)._parameters[site.parameter].detach()
            weight = weight.mT if site.transposed else weight  # (written, read)
            eye = torch.eye(site.width, dtype=tensor.dtype)
            change = (eye + slices).mT
            new = (
                change @ weight.to(tensor.dtype)
                if site.writer
                else weight.to(tensor.dtype) @ change
            )
            changed[f"{site.path}.{site.parameter}"] = new.mT if site.transposed else new
    return changed


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("decomposition", STREAM_FORMATS)
def test_forward_and_gradients_are_those_of_the_changed_weights(family, decomposition):
    plain, inputs = base(family), LAW_FAMILIES[family].inputs()
    model = copy.deepcopy(plain)
    adapter = on(model, decomposition, alpha=0.6)
    found, expected = (
        model(**inputs)[0],
        functional_call(plain, by_definition(adapter, plain), (), inputs)[0],
    )
    assert close(found, expected, 1e-10)
    assert not close(found, output(plain, inputs), 1e-4)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    ours = torch.autograd.grad((found * weight).sum(), trained)
    theirs = torch.autograd.grad((expected * weight).sum(), trained)
    assert all(close(one, other, 1e-9) for one, other in zip(ours, theirs))


def test_packed_experts_are_changed_where_they_are_read():
    plain, inputs = base("experts", torch.float32), LAW_FAMILIES["experts"].inputs()
    model = copy.deepcopy(plain)
    adapter = on(model, "cp")
    expected = functional_call(plain, by_definition(adapter, plain), (), inputs)[0]
    assert close(output(model, inputs), expected, 1e-4)
    assert {site.role for site in adapter.sites} >= {"gate+up", "down"}


@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_merged_is_adapted_and_unmerging_gives_every_bit_back(family):
    plain, inputs = base(family, torch.float32), LAW_FAMILIES[family].inputs()
    model = copy.deepcopy(plain)
    adapter = on(model, "cp")
    expected = output(model, inputs)
    adapter.merge()
    assert close(output(model, inputs), expected, 1e-5)
    adapter.unmerge()
    for name, weight in plain.state_dict().items():
        assert same_bits(
            weight,
            model.get_submodule(name.rpartition(".")[0]).state_dict()[name.rpartition(".")[2]],
        )
    assert same_bits(output(model, inputs), expected)
    adapter.remove()
    assert same_bits(output(model, inputs), output(plain.requires_grad_(False), inputs))


@pytest.mark.parametrize("family", DENSE)
def test_a_fresh_one_changes_no_bit_and_learns_at_once(family):
    plain, inputs = base(family, torch.float32), LAW_FAMILIES[family].inputs()
    model = copy.deepcopy(plain)
    adapter = on(model, init="invariant")
    assert same_bits(output(model, inputs), output(plain.requires_grad_(False), inputs))
    model(**inputs)[0].square().sum().backward()
    for group in adapter.groups:
        network = adapter.network(group)
        assert network.tensors[network.legs.zero].grad.any()


@pytest.mark.parametrize("family", DENSE)
def test_files_and_exports_make_the_same_model(family, tmp_path):
    plain, inputs = base(family, torch.float32), LAW_FAMILIES[family].inputs()
    model = copy.deepcopy(plain)
    adapter = on(model, alpha=0.5)
    expected = output(model, inputs)
    adapter.save(tmp_path / "own")
    again = copy.deepcopy(plain)
    loaded = lortalib.nn.load(again, tmp_path / "own")
    assert same_bits(output(again, inputs), expected)
    assert loaded.sites == adapter.sites
    merged = copy.deepcopy(adapter)  # exported from merged weights too
    adapter.merge()
    adapter.export_lora(tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora").eval()
    assert close(output(lora, inputs), expected, 1e-4)
    del merged
    read = lortalib.nn.read(tmp_path / "own")
    with pytest.raises(ValueError, match="needs the weights of its model"):
        lortalib.nn.export_lora(read, tmp_path / "none")
    with pytest.raises(ValueError, match="is on no model"):
        read.delta(read.sites[0])
    lortalib.nn.export_lora(read, tmp_path / "again", plain)
    second = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "again").eval()
    assert same_bits(output(second, inputs), output(lora, inputs))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("family", ["decoder", "encoder", "fused, stored (in, out)"])
def test_several_adapters_add_up_whatever_they_act_on(family, grad):
    plain, inputs = base(family), LAW_FAMILIES[family].inputs()
    model = copy.deepcopy(plain)
    adapters = [
        on(model, "indscal", name="one", seed=1),
        put(model, "cp", targets="all", name="two", seed=2, dtype=torch.float64),
        on(model, "tt", name="three", seed=3),
    ]
    changed = copy.deepcopy(plain)
    with torch.no_grad():
        for adapter in adapters:
            for site in adapter.sites:
                changed.get_submodule(site.path)._parameters[site.parameter].add_(
                    adapter.delta(site)
                )
    with torch.set_grad_enabled(grad):
        assert close(model(**inputs)[0], changed(**inputs)[0], 1e-10)
    one, two, three = adapters
    with unchanged(model), pytest.raises(ValueError, match=r"Call disable\(\) on 'one' first"):
        two.merge()
    three.disable()
    one.merge()
    with unchanged(model), pytest.raises(ValueError, match=r"Call disable\(\) on 'three' first"):
        three.enable()
    three.merge()
    two.merge()
    assert close(output(model, inputs), output(changed, inputs), 1e-10)
    with unchanged(model), pytest.raises(ValueError, match=r"Call disable\(\) on 'one' first"):
        one.unmerge()
    with one.disabled():
        assert one.active is False
    assert one.merged
    assert close(output(model, inputs), output(changed, inputs), 1e-10)
    for adapter in adapters:
        adapter.remove()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True)
    )


def test_rows_of_a_batch_have_tensors_of_their_own():
    plain = base("decoder")
    inputs = words()
    model = copy.deepcopy(plain)
    adapter = on(model)
    expected = output(model, inputs)
    served = copy.deepcopy(plain)
    bank = lortalib.nn.bank(
        served, "indscal", 2, targets="all", acts_on="stream", dtype=torch.float64
    )
    bank["one"] = adapter
    with bank.using(["one", None]):
        found = output(served, inputs)
    assert close(found[0], expected[0], 1e-10)
    assert close(found[1], output(plain, inputs)[1], 1e-10)
    with pytest.raises(ValueError, match="adapts other projections"):
        bank["two"] = put(copy.deepcopy(plain), "cp", targets="all")


@pytest.mark.parametrize("family", ["decoder", "encoder", "fused, stored (in, out)"])
def test_peft_has_it_as_an_argument(family, tmp_path):
    plain, inputs = base(family), LAW_FAMILIES[family].inputs()
    drawn = on(copy.deepcopy(plain), targets="qkvo")
    targets = sorted({site.path for site in drawn.sites})
    config = LortaConfig(rank=2, decomposition="indscal", acts_on="stream", target_modules=targets)
    model = peft.get_peft_model(copy.deepcopy(plain), config, autocast_adapter_dtype=False).eval()
    record = model.base_model.lorta_adapters["default"]
    with torch.no_grad():
        for own, given in zip(record.parameters(), drawn.parameters(), strict=True):
            own.copy_(given)
    expected = functional_call(plain, by_definition(drawn, plain), (), inputs)[0]
    assert close(output(model, inputs), expected, 1e-10)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        copy.deepcopy(plain), tmp_path, autocast_adapter_dtype=False
    )
    assert close(output(again.eval(), inputs), expected, 1e-10)
    weights = LortaConfig(rank=2, init_weights=False, target_modules=targets)
    model.add_adapter("weights", weights, autocast_adapter_dtype=False)
    model.set_adapter("weights")
    other = output(model.eval(), inputs)
    mixed = model(**inputs, adapter_names=["default", "weights"])[0]
    assert close(mixed[0], expected[0], 1e-10)
    assert close(mixed[1], other[1], 1e-10)
    model.base_model.set_adapter(["default", "weights"])
    both = output(model, inputs)
    model.merge_adapter()
    assert close(output(model, inputs), both, 1e-10)
    model.unmerge_adapter()
    model.set_adapter("default")
    assert close(output(model.merge_and_unload(), inputs), expected, 1e-10)


def test_it_compiles_to_one_graph():
    model, inputs = base("decoder"), words()
    on(model, name="one")
    on(model, "cp", name="two")
    expected = output(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert close(output(compiled, inputs), expected, 1e-10)


def test_the_stream_is_read_once_for_all_readers(monkeypatch):
    from lortalib.nn._forward import scope

    model, inputs = base("decoder"), words()
    on(model, "indscal", targets="all")
    taken = []
    down = scope.down
    monkeypatch.setattr(scope, "down", lambda *args: taken.append(1) or down(*args))
    output(model, inputs)
    layers = len({s.layer for s in lortalib.nn.adapters(model)["default"].sites})
    assert len(taken) == layers * 4  # qkv, o, gate and up, down


def test_a_part_of_a_fused_module_is_refused():
    model = base("fused, stored (in, out)")
    with unchanged(model), pytest.raises(UnsupportedModelError, match="name all of its parts"):
        on(model, targets="qv")


def test_wrong_arguments_are_refused_before_anything_changes():
    model = base("decoder")
    with unchanged(model):
        with pytest.raises(ValueError, match="acts_on must be 'weights' or 'stream'"):
            lortalib.nn.apply(model, acts_on="residual")
        with pytest.raises(ValueError, match="acts_on must be"):
            LortaConfig(acts_on="x")
        with pytest.raises(LegsError, match="equal sizes"):
            lortalib.nn.apply(model, "indscal", 2, acts_on="weights")
        with pytest.raises(LegsError, match="names a mode"):
            lortalib.nn.apply(model, "in r, out r, head r, layer r, matrix r", 2, acts_on="stream")


@pytest.mark.parametrize("line", ["indscal", "rescal", "in r, out r (tied), layer matrix r"])
def test_a_format_with_one_parameter_on_both_sides_acts_on_the_stream_if_nobody_says(line):
    adapter = lortalib.nn.apply(base("decoder"), line, 2)
    assert adapter.config.acts_on == "stream"
    assert lortalib.nn.plan(base("decoder"), decomp.indscal, 2).config.acts_on == "stream"
    config = LortaConfig(decomposition=line, rank=2, target_modules=["q_proj", "o_proj"])
    model = peft.get_peft_model(base("decoder"), config)
    assert model.base_model.lorta_adapters["default"].config.acts_on == "stream"
    assert lortalib.nn.apply(base("decoder"), "cp", 2).config.acts_on == "weights"


def test_attention_that_reads_its_weights_directly():
    text = {**BERT, "projection_size": 16}
    vision = {**BERT, **IMAGE}
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    plain, inputs = transformers.SiglipModel(config).eval().double(), image_and_words()
    model = copy.deepcopy(plain)
    adapter = on(model, "cp")
    expected = functional_call(plain, by_definition(adapter, plain), (), inputs)
    assert any(site.weight_read_directly for site in adapter.sites)
    with torch.no_grad():
        found = model(**inputs)
    assert close(found.image_embeds, expected.image_embeds, 1e-9)
    assert close(found.text_embeds, expected.text_embeds, 1e-9)


# --- beside merged weights and other hooks ----------------------------------------------------------


def test_a_bank_on_the_stream_refuses_a_merged_weight():
    model, inputs = base("decoder"), words()
    bank = lortalib.nn.bank(
        model, "indscal", 2, targets="all", acts_on="stream", dtype=torch.float64
    )
    bank["one"] = on(base("decoder"))
    adapter = put(model, "cp", targets="all", dtype=torch.float64)
    adapter.merge()
    with (
        unchanged(model),
        pytest.raises(ValueError, match="unmerge it first"),
        bank.using(["one"] * 2),
    ):
        output(model, inputs)
    adapter.unmerge()
    with bank.using(["one"] * 2):
        output(model, inputs)


def test_what_a_merged_one_acts_through_does_not_become_another_base():
    model = base("encoder")
    other = put(model, "cp", targets="all", name="other", dtype=torch.float64)
    stream = on(model, name="stream")
    stream.merge()
    other.merge()
    with (
        unchanged(model),
        pytest.raises(ValueError, match="'stream' acts on the stream and is merged"),
    ):
        other.remove(merged=True)
    stream.disable()
    other.remove(merged=True)


def test_an_export_with_a_model_takes_its_base_and_says_what_does_not_fit(tmp_path):
    plain, inputs = base("decoder", torch.float32), words()
    model = copy.deepcopy(plain)
    adapter = on(model)
    expected = output(model, inputs)
    adapter.save(tmp_path / "own")
    read = lortalib.nn.read(tmp_path / "own")
    host = copy.deepcopy(plain)
    put(host, "cp", targets="all").merge()
    lortalib.nn.export_lora(read, tmp_path / "lora", host)
    lora = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora").eval()
    assert close(output(lora, inputs), expected, 1e-4)
    with pytest.raises(ValueError, match="does not fit BertModel"):
        lortalib.nn.export_lora(read, tmp_path / "none", base("encoder"))


def test_a_writer_that_reads_its_own_output_reads_it_whole():
    class Twice(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(self.inner(x))

    plain = base("encoder")
    model = copy.deepcopy(plain)
    one, two = (
        on(model, name="one"),
        put(model, "cp", targets="all", name="two", dtype=torch.float64),
    )
    site = next(site for site in one.sites if site.role == "o")
    module = model.get_submodule(site.path)
    x = torch.randn(1, 3, site.width, dtype=torch.float64)
    weight = plain.get_submodule(site.path).weight + one.delta(site) + two.delta(site.path)
    bias = plain.get_submodule(site.path).bias
    expected = torch.nn.functional.linear(torch.nn.functional.linear(x, weight, bias), weight, bias)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert close(Twice(module)(x), expected, 1e-10)


def test_a_bias_that_is_a_method_is_left_out():
    from lortalib.nn.door import without_bias

    linear = torch.nn.Linear(3, 4)
    quantised = type("Linear", (torch.nn.Module,), {"bias": lambda self: linear.bias})()
    y = torch.ones(2, 4)
    assert torch.equal(without_bias(quantised, y), y - linear.bias)
