"""What the library is compared with: definitions, index by index, in NumPy, and TensorLy itself.

Slow, and sharing no code with it.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import tensorly as tl


def _terms(net):
    return [(t.legs, p.detach().numpy()) for t, p in zip(net.legs.terms, net.tensors)]


def _legs(net):
    return list(dict.fromkeys(leg for names, _ in _terms(net) for leg in names))


def factors(net, mode):
    """The legs that make up a mode: itself, or its factors, the slowest first."""
    own = [leg for leg in _legs(net) if leg.split(".")[0] == mode]
    return [mode] if mode in _legs(net) else sorted(own, key=lambda leg: int(leg.split(".")[1]))


def open_legs(net):
    return [leg for mode in net.modes for leg in factors(net, mode)]


def _bonds(net):
    return [leg for leg in _legs(net) if leg not in open_legs(net)]


def digits(net, index):
    """The position on every factor for positions on modes, as the digits of a number."""
    at = {}
    for mode, position in index.items():
        for leg in reversed(factors(net, mode)):
            at[leg] = position % net.sizes[leg]
            position //= net.sizes[leg]
        assert position == 0
    return at


def entry(net, index):
    """One entry of the tensor: a sum over all bonds of products of one number per parameter."""
    terms, bonds, total = _terms(net), _bonds(net), 0.0
    for position in product(*(range(net.sizes[bond]) for bond in bonds)):
        at = {**digits(net, index), **dict(zip(bonds, position))}
        total += math.prod(array[tuple(at[leg] for leg in legs)] for legs, array in terms)
    return total


def dense(net):
    """Every entry: the outer product with one axis for each leg, summed over the bonds."""
    modes = open_legs(net)
    legs = [*modes, *_bonds(net)]
    outer = np.ones([net.sizes[leg] for leg in legs])
    for names, array in _terms(net):
        order = sorted(range(len(names)), key=lambda axis: legs.index(names[axis]))
        sizes = [net.sizes[leg] if leg in names else 1 for leg in legs]
        outer = outer * array.transpose(order).reshape(sizes)
    found = outer.sum(axis=tuple(range(len(modes), len(legs))))
    shape = [math.prod(net.sizes[leg] for leg in factors(net, mode)) for mode in net.modes]
    return found.reshape(shape)


def matrix(tensor, modes):
    """The (head*out, in) matrix of a tensor over in, out and perhaps head.

    Row ``h*out + j``, column i holds the entry at head h, component j, input i.
    """
    size = dict(zip(modes, tensor.shape))
    rows = np.full((size.get("head", 1) * size["out"], size["in"]), np.nan)
    for h, j, i in np.ndindex(size.get("head", 1), size["out"], size["in"]):
        at = {"head": h, "out": j, "in": i}
        rows[h * size["out"] + j, i] = tensor[tuple(at[mode] for mode in modes)]
    return rows


def smallest_crossing(net):
    """The least product of bonds between the side of ``in`` and that of ``head`` and ``out``.

    All divisions of the parameters are tried. Where one parameter has legs of ``in`` and of the other
    side, those of ``in`` cross, unless all of ``in`` is less.
    """
    terms = [set(names) for names, _ in _terms(net)]
    inputs = {*factors(net, "in")}
    outputs = {leg for mode in ("head", "out") if mode in net.modes for leg in factors(net, mode)}
    best, whole = None, math.prod(net.sizes[leg] for leg in inputs)
    both = [term for term in terms if term & inputs and term & outputs]
    for sides in product((False, True), repeat=len(terms)):
        pairs = list(zip(sides, terms))
        near = set().union(*(term for far, term in pairs if not far))
        far = set().union(*(term for far, term in pairs if far))
        mixed = set().union(*both) & inputs
        if (far & inputs) - mixed or near & outputs or not near & inputs:
            continue
        crossing = math.prod(net.sizes[bond] for bond in (near & far) | mixed)
        best = crossing if best is None else min(best, crossing)
    return whole if best is None or (both and whole <= best) else best


def cheapest_division(terms, sizes, out_modes, batch_modes):
    """Parameters on the side of ``in``, the others, and the bonds that cross, by trying every division.

    The least product of bonds; among equals the fewest parameters beside ``in``; then the first of them
    in the order in which divisions are tried.
    """
    pinned = []
    for term in terms:
        far = any(mode in term for mode in out_modes)
        if far and "in" in term:
            return (), tuple(range(len(terms))), ("in",)
        pinned.append((0,) if "in" in term else (1,) if far else (0, 1))
    found = []
    for sides in product(*pinned):
        near = [k for k, side in enumerate(sides) if not side]
        far = [k for k, side in enumerate(sides) if side]
        beyond = {leg for k in far for leg in terms[k]}.difference(batch_modes)
        bonds = dict.fromkeys(leg for k in near for leg in terms[k] if leg in beyond)
        cost = math.prod(sizes[bond] for bond in bonds), len(near), len(found)
        found.append((cost, (tuple(near), tuple(far), tuple(bonds))))
    return min(found)[1]


def on(backend, call):
    """What ``call`` returns in a new thread with this backend; no setting outlives the thread."""

    def run():
        tl.set_backend(backend, local_threadsafe=True)
        return call()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def close(found, expected):
    """Fails where a tensor is not this array, up to rounding in float64."""
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-9)


def rebuilt(obj):
    """TensorLy's own reconstruction of one of its objects."""
    return on("pytorch", obj.to_tensor)
