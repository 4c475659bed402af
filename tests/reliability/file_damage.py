"""Damage to the files of an adapter, drawn at random: by accident, and by somebody who means harm."""

import contextlib
import copy
import json
import struct

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_files import FILE, description, edit, tensors
from test_any_damage import VALUES, flipped, places

from lortalib.nn._files import digest

BANK = "bank.safetensors"
LORA = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def near(value, draw):
    """A value of the same type that is nearly the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + draw.choice([-1, 1, 7, 10**6, 2**31, 2**63, -(2**63)])
    if isinstance(value, float):
        return draw.choice([-value, value * 1e30, value / 1e30, 0.0])
    if isinstance(value, str):
        place = draw.randrange(len(value) + 1)
        more = draw.choice(["", ".", "/", "(", "[/x]", "\x00", "é", "\ud800", "a" * 3000, ", "])
        return value[:place] + more + value[place + draw.randrange(2) :]
    if isinstance(value, list):
        return draw.choice([value * 2, value[:-1], value[::-1], value * 300, [value]])
    if isinstance(value, dict):
        return {**value, draw.choice(["more", "", "training", "_modules", "a.b"]): 1}
    return draw.choice(VALUES)


def mutated(value, draw):
    """A JSON value with one or two of its parts replaced, removed, or added to."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 2])):
        path = draw.choice([path for path in places(value) if path] or [()])
        if not path:
            return draw.choice(VALUES)
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        kind = draw.choice(["other type", "near", "near", "gone", "elsewhere"])
        if kind == "other type":
            owner[path[-1]] = copy.deepcopy(draw.choice(VALUES))
        elif kind == "near":
            owner[path[-1]] = near(owner[path[-1]], draw)
        elif kind == "gone":
            del owner[path[-1]]
        else:
            owner[path[-1]] = copy.deepcopy(value)
    return value


def text_of(value):
    return json.dumps(value)


def other_tensor(tensor, draw):
    changes = [
        lambda t: t[:-1].contiguous(),
        lambda t: torch.cat([t, t]),
        lambda t: t.flatten(),
        lambda t: t.unsqueeze(0),
        lambda t: t.half(),
        lambda t: t.int(),
        lambda t: t.bool(),
        lambda t: t.to(torch.complex64),
        lambda t: t.to(torch.float8_e4m3fn),
        lambda t: t.double() * 1e200,
        lambda t: t * 1e30,
        lambda t: t / 0,
        lambda t: t.new_zeros(0),
        lambda t: t.new_zeros(()),
    ]
    return draw.choice(changes)(tensor) if tensor.dim() else tensor.unsqueeze(0)


def mutate_tensors(tensors, draw):
    """Another tensor under a name, another name, one more or one less; the tensors stay consistent."""
    name = draw.choice(list(tensors))
    kind = draw.choice(["other", "other", "other", "gone", "renamed", "more", "swapped"])
    if kind == "other":
        tensors[name] = other_tensor(tensors[name], draw)
    elif kind in ("gone", "renamed"):
        value = tensors.pop(name)
        if kind == "renamed":
            tensors[near(name, draw).replace("\ud800", "")] = value
    elif kind == "more":
        tensors[name + draw.choice([".more", "", "_", ":x"])] = tensors[name].clone()
    else:
        other = draw.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]


def apart(tensors):
    """Copies, each in memory of its own: not in the file that is to be written."""
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def header_of(data):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(data, change):
    header, rest = header_of(data)
    text = text_of(change(header)).encode()
    return struct.pack("<Q", len(text)) + text + rest


def raw(file, draw):
    """Bits, bytes, length or header changed, whatever that makes of the digest."""
    data = file.read_bytes()
    kind = draw.choice(["bit", "bytes", "cut", "grown", "splice", "header", "size"])
    if kind == "bit":
        data = flipped(data, draw.randrange(8 * len(data)))
    elif kind == "bytes":
        data = bytearray(data)
        for _ in range(draw.randrange(1, 9)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif kind == "cut":
        data = data[: draw.randrange(len(data))]
    elif kind == "grown":
        data = data + draw.randbytes(draw.randrange(1, 64))
    elif kind == "splice":
        one, other = sorted(draw.choices(range(len(data)), k=2))
        data = data[:one] + data[other:] + data[one:other]
    elif kind == "size":
        data = struct.pack("<Q", draw.choice([0, 1, 2**20, 2**31, 2**63, 2**64 - 1])) + data[8:]
    elif file.suffix == ".safetensors":
        data = with_header(data, lambda header: mutated(header, draw))
    file.write_bytes(bytes(data))
    return kind


def harm_bank(file, draw):
    """Other names or tensors of a bank, with the right digest where the library writes one."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    values = apart(load_file(file))
    kind = draw.choice(["names", "tensors"])
    if kind == "names":
        names = mutated(json.loads(values["names"].numpy().tobytes()), draw)
        values["names"] = torch.frombuffer(bytearray(text_of(names).encode()), dtype=torch.uint8)
    else:
        mutate_tensors(values, draw)
    with contextlib.suppress(ValueError, KeyError):
        metadata["sha256"] = digest(metadata["adapter"], values)
    save_file(apart(values), file, metadata=metadata)
    return f"{kind} of the bank"


def meant(folder, draw):
    """A file of somebody who means harm: what is changed has the right digest, or needs none."""
    files = {file.name for file in folder.iterdir()}
    if BANK in files and draw.random() < 0.8:
        return harm_bank(folder / BANK, draw)
    if FILE in files and "adapter.json" not in files:
        if draw.random() < 0.7:
            edit(folder, text=text_of(mutated(description(folder), draw)))
            return "json"
        values, text = apart(tensors(folder)), text_of(description(folder))
        mutate_tensors(values, draw)
        try:
            edit(folder, numbers=lambda old: [old.clear(), old.update(values)])
        except ValueError:  # of a type that the library writes no digest of
            metadata = {"format": "pt", "lortalib": text, "sha256": "0" * 64}
            save_file(apart(values), folder / FILE, metadata=metadata)
        return "tensors"
    text = folder / (CONFIG if CONFIG in files else "adapter.json")
    if draw.random() < 0.7:
        text.write_text(text_of(mutated(json.loads(text.read_text()), draw)))
        return "json"
    weights = folder / (LORA if LORA in files else FILE)
    values = apart(load_file(weights))
    mutate_tensors(values, draw)
    save_file(apart(values), weights, metadata={"format": "pt"})
    return "tensors"
