"""Any damage to a file, and any content of a stranger's: refused with the right error, in little time."""

import copy
import json
import random
import shutil
import struct
import time
from contextlib import suppress
from pathlib import Path

import pytest
from adapted import output, put, unchanged
from hypothesis import example, given
from hypothesis import strategies as st
from models import FAMILIES
from saved_files import FILE, description, edit
from strategies import examples

from lortalib.nn import AdapterFileError, load
from lortalib.nn._files import read, read_description
from lortalib.nn._files.lora_file import open_lora


@pytest.fixture
def saved(llama, tmp_path):
    put(llama, "tt", name="saved", train_also=["lm_head"]).save(tmp_path)
    return tmp_path


def group(change):
    return lambda d: change(d["groups"][0])


def site(change):
    return lambda d: change(d["groups"][0]["sites"][0])


# What a stranger's file may cost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (group(lambda g: g.update(legs="in r (" + " " * 3000)), "is no leg name"),
        (group(lambda g: g.update(legs="in r (" * 1600)), "no leg name|different legs|unknown"),
        (group(lambda g: g.update(legs="in r, " * 10_000)), "at most 10,000 and 64 are read"),
        (group(lambda g: g.update(legs=", ".join(["r"] * 65))), "and 65 parameters; at most"),
        (
            group(lambda g: g.update(legs=" ".join(f"b{k}" for k in range(53)))),
            "a line of 53 different legs; at most 52",
        ),
        (group(lambda g: g.update(legs="a" * 10**7)), "a line of 10,000,000 characters"),
        (group(lambda g: g.update(sites=[{}] * 100_001)), "more than 100,000 sites"),
        (lambda d: d.update(groups=d["groups"] * 2001), "no list of 1 to 2,000 groups"),
        (
            lambda d: d.update(trained_modules=[f"m{k}" for k in range(1001)]),
            "the trained modules are",
        ),
    ],
)
def test_a_description_out_of_bounds_costs_no_time(saved, change, message):
    edit(saved, change)
    start = time.monotonic()
    with pytest.raises(AdapterFileError, match=message):
        read(saved)
    assert time.monotonic() - start < 4


def test_a_header_out_of_bounds_is_not_read(saved):
    with (saved / FILE).open("wb") as file:
        file.write(struct.pack("<Q", 2**31))
        file.truncate(2**32)  # sparse
    start = time.monotonic()
    with pytest.raises(
        AdapterFileError, match=r"header would have 2,147,483,648 bytes, of at most"
    ):
        read(saved)
    assert time.monotonic() - start < 1


def with_header(folder, change, length=None):
    """Write the file with another header, and with so many bytes behind it."""
    data = (folder / FILE).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    with (folder / FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data[8 + size :])
        file.truncate(8 + len(text) + (len(data) - 8 - size if length is None else length))


def test_a_large_unknown_tensor_is_not_read(saved):
    def change(header):
        end = max(entry["data_offsets"][1] for entry in header.values() if "dtype" in entry)
        header["more"] = {"dtype": "U8", "shape": [2**31 - end], "data_offsets": [end, 2**31]}

    with_header(saved, change, 2**31)  # sparse
    start = time.monotonic()
    with pytest.raises(AdapterFileError, match="unknown tensors: 'more'"):
        read(saved)
    assert time.monotonic() - start < 1


KEY = "networks.layers.layer_a_b"


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[KEY].update(data_offsets=[0, 32]),  # where another tensor is
        lambda h: h.pop(KEY),  # a gap
        lambda h: h[KEY].update(data_offsets=h[KEY]["data_offsets"][::-1]),
        lambda h: h[KEY].update(data_offsets=[-32, 0]),
        lambda h: h[KEY].update(shape=[2, 2, 4]),
        lambda h: h[KEY].update(shape=[-2, -2, 2]),
        lambda h: h[KEY].update(shape=[1] * 65 + [8]),
        lambda h: h[KEY].update(shape=[2**62, 2**62]),
        lambda h: h[KEY].update(shape="8"),
        lambda h: h[KEY].update(more=1),
        lambda h: h.update(more=5),
        lambda h: h["__metadata__"].update(more=5),
        lambda h: h.update(__metadata__=[]),
    ],
)
def test_a_header_that_lies(change, saved):
    with_header(saved, change)
    with pytest.raises(AdapterFileError, match="damaged or cut short"):
        read(saved)


@pytest.mark.parametrize("more", [-1, 1, 8])
def test_a_file_of_another_length(more, saved):
    data = (saved / FILE).read_bytes()
    (saved / FILE).write_bytes(data[:more] if more < 0 else data + bytes(more))
    with pytest.raises(AdapterFileError, match="shorter or longer than its header says"):
        read(saved)


# Any damage at all


def fresh():
    return FAMILIES["Bert"].model("ForSequenceClassification", num_hidden_layers=1)


class Damage:
    """A saved adapter in memory, to be written with something changed and loaded."""

    def __init__(self, folder):
        self.inputs = FAMILIES["Bert"].inputs()
        adapter = put(fresh(), rank=1, targets="qo", train_also=["classifier"], dropout=0.5)
        self.folder = adapter.save(folder)
        self.file = folder / FILE
        self.data = self.file.read_bytes()

    def try_to_load(self, data=None):
        """Either an error of the right kind and nothing changed, or an adapter that works."""
        self.file.write_bytes(self.data if data is None else data)
        model = fresh()
        with unchanged(model):
            try:
                adapter = load(model, self.folder)
            except (AdapterFileError, FileNotFoundError) as error:
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


def test_undamaged_it_works(damage):
    assert damage.try_to_load() == "it works"


def flipped(data, bit):
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def test_no_bit_can_flip_unseen(damage):
    """Every bit of the first 16 bytes, and 400 drawn from the whole file."""
    bits = [*range(128), *random.Random(0).choices(range(8 * len(damage.data)), k=400)]
    for bit in bits:
        damage.file.write_bytes(flipped(damage.data, bit))
        for reader in (read, read_description):
            with pytest.raises((AdapterFileError, FileNotFoundError)):
                reader(damage.folder)


def test_no_bit_of_version_1_or_of_a_lora_raises_anything_else(tmp_path):
    """Version 1 and PEFT have no digest; an export has one."""
    golden = Path(__file__).parents[1] / "golden"
    for name in ("adapter-v1", "lora"):
        shutil.copytree(golden / name, tmp_path / name)
        for file in sorted((tmp_path / name).iterdir()):
            data = file.read_bytes()
            for bit in random.Random(0).choices(range(8 * len(data)), k=200):
                file.write_bytes(flipped(data, bit))
                try:
                    if name == "lora":
                        with open_lora(tmp_path / name) as opened:
                            opened.read()
                    else:
                        read(tmp_path / name)
                except (AdapterFileError, FileNotFoundError):
                    continue
                assert file.name != "adapter_model.safetensors"
            file.write_bytes(data)


@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
@examples(150)
def test_any_byte_changed(damage, place, value):
    data = bytearray(damage.data)
    data[place % len(data)] = value
    same = bytes(data) == damage.data
    assert (damage.try_to_load(bytes(data)) == "it works") == same


@given(length=st.integers(0, 10**6))
@examples(40)
def test_any_file_cut_short(damage, length):
    assert damage.try_to_load(damage.data[: length % len(damage.data)]) != "it works"


@pytest.mark.parametrize("kind", [b"I32", b"U32"])
def test_a_dtype_of_the_same_size(damage, kind):
    for place in range(damage.data.count(b"F32")):
        parts = damage.data.split(b"F32")
        changed = b"F32".join(parts[: place + 1]) + kind + b"F32".join(parts[place + 1 :])
        assert damage.try_to_load(changed) != "it works"


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
    """Written with the right digest, as somebody would who means harm."""
    damage.file.write_bytes(damage.data)
    value = description(damage.folder)
    path = data.draw(st.sampled_from([path for path in places(value) if path]))
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    if data.draw(st.booleans()):
        del owner[path[-1]]
    else:
        owner[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
    edit(damage.folder, text=json.dumps(value))
    damage.try_to_load(damage.file.read_bytes())


@given(text=st.text(alphabet='{}[]",:0 \n', max_size=20))
@example(text='{"format": 1e999}')
@examples(20)
def test_any_text_as_a_description(damage, text):
    damage.file.write_bytes(damage.data)
    edit(damage.folder, text=text)
    assert damage.try_to_load(damage.file.read_bytes()) != "it works"


@given(data=st.data())
@examples(100)
def test_any_value_of_version_1_replaced(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("v1")
    golden = Path(__file__).parents[1] / "golden" / "adapter-v1"
    shutil.copy(golden / FILE, folder)
    value = json.loads((golden / "adapter.json").read_text())
    path = data.draw(st.sampled_from([path for path in places(value) if path]))
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
    (folder / "adapter.json").write_text(json.dumps(value))
    with suppress(AdapterFileError):
        assert repr(read(folder))
