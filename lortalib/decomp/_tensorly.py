"""Converts networks to TensorLy's objects and back.

TensorLy has one backend setting for the process and one for each thread, and its own context manager
changes the process-wide one. Therefore a call of TensorLy here runs in a new thread, whose own setting is
PyTorch, unless that is the setting already: the user's settings are never changed, also if a call fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, Union

import tensorly as tl
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor
from torch import Tensor

from ._arguments import takes_network
from ._formats import get_format
from ._legs import Legs
from ._lines import train_line
from ._modes import LORTA_MODES, Shape
from ._network import Network
from ._tensor_network import TensorNetwork

TensorLyObject = Union[CPTensor, TuckerTensor, TTTensor]


Modes = Union[str, Sequence[str], Mapping[str, int]]


Result = TypeVar("Result")


@takes_network
def to_tensorly(net: TensorNetwork) -> TensorLyObject:
    """Make a TensorLy object from the parameters of a network themselves, with live autograd.

    Args:
        net: the network.

    Returns:
        A ``CPTensor``, ``TuckerTensor`` or ``TTTensor``. The axes of CP and Tucker are in the order of
        ``net.modes``, those of a train in the order of the train. The object's attribute ``modes``
        holds their names; `from_tensorly` reads it. TensorLy's own reconstruction is ``net.dense()``
        permuted to that order. A split mode is there as its factors, each an axis.

    Raises:
        ValueError: the network is neither CP nor Tucker, nor a tensor train with one mode on each
            factor.

    Example:
        >>> from lortalib.decomp import cp
        >>> to_tensorly(cp((2, 2, 4, 8, 4), rank=3)).rank
        3
    """
    modes, net = net.modes, net.split
    read = _as_cp(net) or _as_tucker(net) or _as_tt(net)
    if read is None:
        raise ValueError(
            "only CP, Tucker and tensor trains with one mode on each factor have a TensorLy "
            f"object; this network is\n    {net.legs}"
        )
    kind, content, axes = read
    obj = with_pytorch(lambda: kind(content))
    obj.modes, obj.dense_modes = tuple(axes), modes
    return obj


def from_tensorly(obj: TensorLyObject, modes: Modes | None = None) -> Network:
    """Make a network from a TensorLy object: its tensors are copied, the weights of CP multiplied in.

    Args:
        obj: a ``CPTensor``, ``TuckerTensor`` or ``TTTensor`` of PyTorch tensors (NumPy arrays are
            converted).
        modes: names of the axes, as a sequence, a string such as ``"layer in out"``, or a mapping to
            sizes, which are checked. By default the names that `to_tensorly` put on the object, else
            ``layer, head, matrix, in, out`` if there are five axes.

    Raises:
        TypeError: another kind of object, or complex factors.
        ValueError: names that do not fit the axes.

    Example:
        >>> from lortalib.decomp import tucker
        >>> net = tucker((2, 2, 4, 8, 4), rank=2, init="normal")
        >>> from_tensorly(net.to_tensorly()).dense().equal(net.dense())
        True
    """
    if not isinstance(obj, (CPTensor, TuckerTensor, TTTensor)):
        raise TypeError(
            f"expected a CPTensor, TuckerTensor or TTTensor of TensorLy; found {type(obj).__name__}"
        )
    order = getattr(obj, "dense_modes", None) if modes is None else None
    names = axis_names(getattr(obj, "modes", None) if modes is None else modes, tuple(obj.shape))
    return network_of(obj, names, order or names)


def network_of(obj: TensorLyObject, names: Sequence[str], order: Sequence[str]) -> Network:
    """Make a network of the object's format, whose axes are named ``names``."""
    legs, tensors = parameters_of(obj, names)
    return Network(legs, tensors, order)


def parameters_of(obj: TensorLyObject, names: Sequence[str]) -> tuple[Legs, list[Tensor]]:
    """Write the line of the object's format, whose axes are named ``names``, and copy its tensors."""
    factors = {name: real(factor, "a factor") for name, factor in zip(names, obj.factors)}
    shape = Shape(dict(zip(names, obj.shape)))
    if isinstance(obj, TTTensor):
        legs = Legs.parse(train_line(names, shape))
        cores = [factors[name].movedim(1, 0) for name in names]  # (mode, left bond, right bond)
        cores[0] = cores[0].squeeze(1)
        cores[-1] = cores[-1].squeeze(-1)
        tensors = cores
    else:
        legs = get_format("cp" if isinstance(obj, CPTensor) else "tucker").legs(shape)
        if isinstance(obj, CPTensor):
            factors[names[0]] = factors[names[0]] * real(obj.weights, "the weights")
        tensors = [factors[term.legs[0]] for term in legs.terms if term.legs[0] in factors]
        if isinstance(obj, TuckerTensor):
            modes = [term.legs[0] for term in legs.terms[:-1]]
            tensors.append(real(obj.core, "the core").permute([names.index(m) for m in modes]))
    return legs, [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]


def _as_cp(net: TensorNetwork) -> tuple[type, Any, Sequence[str]] | None:
    bonds = tuple(net.ranks)
    found = _factors(net)
    if len(bonds) != 1 or found is None:
        return None
    factors = [found[mode] for mode in net.modes]
    return CPTensor, (factors[0].new_ones(net.sizes[bonds[0]]), factors), net.modes


def _as_tucker(net: TensorNetwork) -> tuple[type, Any, Sequence[str]] | None:
    *terms, core = net.legs.terms
    bond_of = {term.legs[0]: term.legs[-1] for term in terms if len(term.legs) == 2}
    if set(bond_of) != set(net.modes) or set(core.legs) != set(net.ranks):
        return None
    if len(terms) != len(net.modes) or sorted(bond_of.values()) != sorted(core.legs):
        return None
    factors = dict(zip(bond_of, net.tensors))
    axes = [core.legs.index(bond_of[mode]) for mode in net.modes]
    return (
        TuckerTensor,
        (net.tensors[-1].permute(axes), [factors[mode] for mode in net.modes]),
        net.modes,
    )


def _as_tt(net: TensorNetwork) -> tuple[type, Any, Sequence[str]] | None:
    """Recognise a train whose cores stand in the line in the order of the train."""
    modes = tuple(leg for term in net.legs.terms for leg in term.legs if leg in net.modes)
    bonds = tuple(net.ranks)
    if len(modes) != len(net.legs.terms) or len(bonds) != len(modes) - 1:
        return None
    cores = []
    for k, (term, tensor) in enumerate(zip(net.legs.terms, net.tensors)):
        legs = (*bonds[max(0, k - 1) : k], modes[k], *bonds[k : k + 1])
        if set(term.legs) != set(legs):
            return None
        core = tensor.permute([term.legs.index(leg) for leg in legs])
        left = net.sizes[bonds[k - 1]] if k else 1
        cores.append(core.reshape(left, net.sizes[modes[k]], -1))
    return TTTensor, cores, modes


def _factors(net: TensorNetwork) -> dict[str, Tensor] | None:
    """Find the (mode, bond) factor of each mode; None if a parameter is something else."""
    found: dict[str, Tensor] = {}
    for term, tensor in zip(net.legs.terms, net.tensors):
        mode = [leg for leg in term.legs if leg in net.modes]
        if len(mode) != 1 or len(term.legs) != 2 or mode[0] in found:
            return None
        found[mode[0]] = tensor if term.legs[0] == mode[0] else tensor.mT
    return found


def real(values: Any, what: str) -> Tensor:
    """Convert values to a tensor of real floating-point numbers; integers get the default dtype.

    Args:
        values: a tensor, a NumPy array or nested numbers.
        what: a noun for them, for the error message.

    Raises:
        TypeError: the values are complex, or no numbers.
    """
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{what} is to be a tensor, an array or nested numbers; found {type(values).__name__}"
        ) from error
    if tensor.is_complex():
        raise TypeError(
            f"networks hold real numbers; found {what} of {tensor.dtype}. Convert the real and the "
            "imaginary part apart, as .real and .imag, or as one more mode with torch.view_as_real"
        )
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def axis_names(modes: Modes | None, sizes: tuple[int, ...]) -> tuple[str, ...]:
    if modes is None:
        if len(sizes) != len(LORTA_MODES):
            raise ValueError(
                f"the tensor has {len(sizes)} axes {sizes}; name them, for instance "
                "modes='layer in out' (only five axes have default names: "
                f"{', '.join(LORTA_MODES)})"
            )
        return LORTA_MODES
    names = tuple(modes.split() if isinstance(modes, str) else modes)
    if len(names) != len(sizes) or len(set(names)) != len(names):
        raise ValueError(
            f"{len(names)} axis names ({', '.join(map(str, names))}) do not fit a tensor of shape "
            f"{sizes}"
        )
    if isinstance(modes, Mapping) and tuple(modes.values()) != sizes:
        raise ValueError(f"the tensor has shape {sizes}, the modes say {dict(modes)}")
    return names


def with_pytorch(call: Callable[[], Result]) -> Result:
    """Run ``call`` where TensorLy's backend is PyTorch: here if it is, else in a new thread."""
    if tl.get_backend() == "pytorch":
        return call()

    def run() -> Result:
        tl.set_backend("pytorch", local_threadsafe=True)
        return call()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()
