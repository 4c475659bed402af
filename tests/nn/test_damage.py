"""Loading what does not fit or is damaged: refused with the reason, and nothing is changed."""

import copy
import json

import pytest
import torch
from harness import examples, output, put, unchanged
from hypothesis import example, given
from hypothesis import strategies as st
from models import FAMILIES
from safetensors.torch import load_file, save_file

from lortalib.nn import AdapterFileError, load

LLAMA_FAMILY = FAMILIES["Llama"]


@pytest.fixture
def saved(llama, tmp_path):
    put(llama, "tt", name="saved", train_also=["lm_head"]).save(tmp_path)
    return tmp_path


@pytest.fixture
def target():
    """A model to load onto that has an adapter already."""
    model = LLAMA_FAMILY.model("ForCausalLM")
    put(model, name="other", seed=1).merge()
    return model


def refuses(model, folder, message, error=AdapterFileError):
    with unchanged(model), pytest.raises(error, match=message):
        load(model, folder)


# Other models


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"hidden_size": 24},
            r"does not fit LlamaForCausalLM; nothing was changed:\n  layers layer 0 q: heads, "
            r"query heads, head_dim, width are \(4, 4, 4, 16\) in the file, \(4, 4, 6, 24\) in the"
            r"(.|\n)*\.\.\. and 3 more",
        ),
        ({"num_hidden_layers": 1}, r"layers layer 1 q: the model has no such projection"),
        ({"num_attention_heads": 2}, r"\(2, 2, 8, 16\) in the model"),
        ({"num_key_value_heads": 4}, r"layer 0 k: .* \(2, 4, 4, 16\) in .*, \(4, 4, 4, 16\) in"),
        ({"num_key_value_heads": 1}, r"layer 0 v: .* \(1, 4, 4, 16\) in the model"),
        ({"head_dim": 8}, r"\(4, 4, 8, 16\) in the model"),
    ],
)
def test_a_llama_of_another_shape(llama, tmp_path, changed, message):
    put(llama).save(tmp_path)
    refuses(LLAMA_FAMILY.model("ForCausalLM", **changed), tmp_path, message)


@pytest.mark.parametrize("name", ["Bert", "OPT", "T5", "CLIP"])
def test_another_architecture(llama, tmp_path, name):
    llama.config._name_or_path = "someone/tiny-llama"
    put(llama).save(tmp_path)
    model = FAMILIES[name].model()
    message = (
        rf"trained on LlamaForCausalLM someone/tiny-llama\) does not fit {type(model).__name__}"
    )
    refuses(model, tmp_path, message)


def test_a_model_with_more_layers_takes_it(llama, tmp_path):
    put(llama).save(tmp_path)
    assert len(load(LLAMA_FAMILY.model(num_hidden_layers=3), tmp_path).sites) == 8


def test_a_model_without_attention(llama, tmp_path):
    put(llama).save(tmp_path)
    refuses(torch.nn.Linear(2, 2), tmp_path, "no attention was found in Linear", ValueError)


def test_a_module_trained_beside_it_that_is_missing_or_unlike(saved):
    message = r"trained beside the module 'lm_head', which LlamaModel does not have"
    refuses(LLAMA_FAMILY.model(), saved, message)
    message = r"'lm_head' saved with the adapter holds .*\(64, 16\).* the model's .*\(80, 16\)"
    refuses(LLAMA_FAMILY.model("ForCausalLM", vocab_size=80), saved, message)


# Missing and damaged files


def test_missing_files(target, saved):
    refuses(target, saved / "nowhere", r"no adapter\.json in .*nowhere", FileNotFoundError)
    (saved / "adapter.safetensors").unlink()
    message = r"no adapter\.safetensors in .*, beside its adapter\.json"
    refuses(target, saved, message, FileNotFoundError)
    (saved / "adapter.json").unlink()
    refuses(target, saved, r"a saved adapter is a folder with", FileNotFoundError)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated_tensors(target, saved, kept):
    file = saved / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refuses(target, saved, r"adapter\.safetensors is damaged or cut short")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"adapter\.json is damaged"),
        ("{", r"adapter\.json is damaged"),
        ("nonsense", r"adapter\.json is damaged"),
        ("\udcff", r"adapter\.json is damaged: .*utf-8"),
        ("[]", r"does not describe a lortalib adapter"),
        ("{}", r"does not describe a lortalib adapter"),
        ('{"peft_type": "LORA"}', r"does not describe a lortalib adapter"),
    ],
)
def test_a_description_that_is_none(target, saved, text, message):
    (saved / "adapter.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    refuses(target, saved, message)


def edit(folder, change):
    """Rewrite the description after ``change(description)``."""
    file = folder / "adapter.json"
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_format_version(target, saved, version):
    edit(saved, lambda d: d.update(format_version=version))
    refuses(target, saved, r"has format version .*reads version 1\. Update lortalib")


@pytest.mark.parametrize("key", ["name", "settings", "trained_beside", "groups"])
def test_a_key_that_is_missing(target, saved, key):
    edit(saved, lambda d: d.pop(key))
    refuses(target, saved, f"is damaged: {key} is missing")


def test_a_site_that_stands_there_twice(target, saved):
    def double(description):
        sites = description["groups"][0]["sites"]
        sites[0] = sites[3]

    edit(saved, double)
    refuses(target, saved, "twice")


def rewrite(folder, change):
    """Rewrite the tensors after ``change(tensors)``."""
    values = load_file(folder / "adapter.safetensors")
    change(values)
    save_file(values, folder / "adapter.safetensors")


NAME = "networks.layers.layer_a_b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"lacks the tensor '{NAME}'"),
        (lambda t: t.pop("beside.lm_head:weight"), r"'lm_head' saved with the adapter holds \{\}"),
        (lambda t: t.update(more=torch.ones(2)), "holds unknown tensors: more"),
        (
            lambda t: t.update({NAME: t[NAME][:, :1].contiguous()}),
            "leg 'a' has size 1 here",
        ),
        (lambda t: t.update({NAME: t[NAME][0].contiguous()}), "has 3 legs but its tensor has"),
        (lambda t: t.update({NAME: t[NAME].repeat(2, 1, 1)}), "layer=4.* its description says"),
        (lambda t: t.update({NAME: t[NAME].int()}), NAME),
        (lambda t: t[NAME].view(-1)[3:4].fill_(float("nan")), f"'{NAME}' holds NaN or infinity"),
        (lambda t: t["beside.lm_head:weight"][0].fill_(float("inf")), "lm_head.* holds NaN"),
    ],
)
def test_tensors_that_do_not_fit(target, saved, change, message):
    rewrite(saved, change)
    refuses(target, saved, message)


# Any damage at all


def fresh():
    return FAMILIES["Bert"].model("ForSequenceClassification", num_hidden_layers=1)


class Damage:
    """A saved adapter in memory, to be written with something changed and loaded."""

    def __init__(self, folder):
        self.inputs = FAMILIES["Bert"].inputs()
        adapter = put(fresh(), rank=1, targets="qo", train_also=["classifier"], dropout=0.5)
        self.folder = adapter.save(folder)
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}

    def try_to_load(self, **changed):
        """Either an error of the right kind and nothing changed, or an adapter that works."""
        for name, data in {**self.files, **changed}.items():
            (self.folder / name).write_bytes(data)
        model = fresh()
        with unchanged(model):
            try:
                adapter = load(model, self.folder)
            except (FileNotFoundError, ValueError) as error:
                return str(error)
            assert repr(adapter)
            output(model.train(), self.inputs)
            output(model.eval(), self.inputs)
            adapter.save(self.folder / "again")
            adapter.remove()
        return "it works"


@pytest.fixture(scope="module")
def damage(tmp_path_factory):
    return Damage(tmp_path_factory.mktemp("damage"))


names = st.sampled_from(["adapter.json", "adapter.safetensors"])


@given(name=names, place=st.integers(0, 10**6), value=st.integers(0, 255))
@examples(150)
def test_any_byte_changed(damage, name, place, value):
    data = bytearray(damage.files[name])
    data[place % len(data)] = value
    damage.try_to_load(**{name: bytes(data)})


@given(name=names, length=st.integers(0, 10**6))
@examples(40)
def test_any_file_cut_short(damage, name, length):
    data = damage.files[name]
    damage.try_to_load(**{name: data[: length % len(data)]})


@pytest.mark.parametrize("kind", [b"I32", b"U32"])
def test_a_dtype_of_the_same_size(damage, kind):
    data = damage.files["adapter.safetensors"]
    for place in range(data.count(b"F32")):
        parts = data.split(b"F32")
        changed = b"F32".join(parts[: place + 1]) + kind + b"F32".join(parts[place + 1 :])
        damage.try_to_load(**{"adapter.safetensors": changed})


def places(value, path=()):
    """The path of every value in a JSON value."""
    yield path
    pairs = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, list) else pairs
    for key, inner in pairs:
        yield from places(inner, (*path, key))


VALUES = [None, True, 0, -1, 3, 10**400, 0.5, 1e999, "", "in r, out r", [], [[]], ["q"], {}]


@given(data=st.data())
@examples(250)
def test_any_value_of_the_description_replaced(damage, data):
    value = json.loads(damage.files["adapter.json"])
    path = data.draw(st.sampled_from([path for path in places(value) if path]))
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    if data.draw(st.booleans()):
        del owner[path[-1]]
    else:
        owner[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
    damage.try_to_load(**{"adapter.json": json.dumps(value).encode()})


@given(text=st.text(alphabet='{}[]",:0 \n', max_size=20))
@example(text='{"format": 1e999}')
@examples(20)
def test_any_text_as_a_description(damage, text):
    damage.try_to_load(**{"adapter.json": text.encode()})


def test_a_description_nested_too_deep(damage):
    assert "damaged" in damage.try_to_load(**{"adapter.json": b"[" * 100_000})


def test_undamaged_it_works(damage):
    assert damage.try_to_load() == "it works"
