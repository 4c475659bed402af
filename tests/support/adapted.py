"""Adapters with random numbers, outputs, and pictures of a model."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from strategies import generator

import lortalib
from lortalib import decomp


def _fits_models(name):
    """Whether the format can be made over the modes of an adapter's tensor on the weights."""
    shape = decomp.Shape((2, 2, 2, 4, 3))
    if decomp.formats[name].symmetric:
        return False
    try:
        decomp.formats[name].legs(shape).check(shape.modes)
    except decomp.LegsError:
        return False
    return True


#: Every registered format that an adapter can have; a new one is tested by joining.
FORMATS = sorted(filter(_fits_models, decomp.formats))

each_format = pytest.mark.parametrize("decomposition", FORMATS)


def put(model, decomposition="cp", rank=2, *, seed=0, **options):
    """An adapter whose update is random and of the size of the weights, unless told otherwise."""
    options = {"init": "normal", "generator": generator(seed), **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ranks larger than the modes can fill")
        return lortalib.nn.apply(model, decomposition, rank, **options)


def output(model, inputs):
    """The model's first output, without gradients."""
    with torch.no_grad():
        return model(**inputs)[0]


def bits(tensor):
    """The bytes of a tensor: equal only where every bit is, also for NaN and negative zero."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).clone()


def same_bits(one, other):
    same_kind = one.shape == other.shape and one.dtype == other.dtype
    return same_kind and torch.equal(bits(one), bits(other))


def close(one, other, tolerance=1e-5):
    """Whether two tensors agree, relative to the largest entry."""
    scale = max(1.0, other.abs().max().item())
    return (one - other).abs().max().item() <= tolerance * scale


def weight(model, site):
    return model.get_submodule(site.path).weight


def picture(model):
    """All that an adapter could change in a model: for each module its class and its attributes.

    Parameters, buffers, submodules and hooks are attributes of a module too, so this holds every
    bit, every name, every requires_grad flag and every hook, in order.
    """
    seen = {}
    for path, module in model.named_modules():
        seen[f"{path} class"] = type(module)
        for name, value in vars(module).items():
            pairs = value.items() if isinstance(value, dict) else [("", value)]
            for key, item in pairs:
                tensor = isinstance(item, torch.Tensor)
                look = (item.requires_grad, bits(item)) if tensor else None
                seen[f"{path}.{name} {key}".strip()] = item, look
    return seen


def changes(before, after):
    """What differs between two pictures of one model, as a list of names."""
    differing = [name for name in before if name in after and not _same(before[name], after[name])]
    lost, new = (list(a.keys() - b.keys()) for a, b in ((before, after), (after, before)))
    moved = [] if lost or new or list(before) == list(after) else ["order"]
    return differing + [f"lost {name}" for name in lost] + [f"new {name}" for name in new] + moved


def _same(one, other):
    if isinstance(one, type):
        return one is other
    (item, look), (other_item, other_look) = one, other
    if look is not None and other_look is not None:
        return (
            item is other_item and look[0] == other_look[0] and torch.equal(look[1], other_look[1])
        )
    plain = isinstance(item, (bool, int, float, str, tuple))
    return item is other_item or (plain and item == other_item)


@contextmanager
def unchanged(model):
    """Fails if anything of the model is not, at the end, what it was at the start."""
    before = picture(model)
    yield
    assert changes(before, picture(model)) == []
