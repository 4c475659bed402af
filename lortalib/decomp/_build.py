"""Builds a network from a parsed line of legs: checks the ranks and makes the starting values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .._kinds import DEVICE, GENERATOR
from .._stacklevel import outside
from ._full import check_full
from ._hashed import make_hashes, start_vectors
from ._legs import Legs
from ._modes import Shape
from ._network import Network
from ._ranks import Rank, read_ranks
from ._start import StartLike, get_start


def build(
    legs: Legs,
    shape: Shape,
    rank: Rank,
    *,
    init: StartLike = "invariant",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """Make the network that a parsed line describes; see `network` for arguments and errors."""
    sizes, tensors = draw(legs, shape, rank, init, generator, device, dtype)
    return Network(legs, tensors, shape.modes, sizes=sizes)


def draw(
    legs: Legs,
    shape: Shape,
    rank: Rank,
    init: StartLike,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> tuple[dict[str, int], list[Tensor]]:
    """Draw the starting values of a network; see `network` for arguments and errors.

    Returns:
        The size of every leg and vector, and what is stored for each term of the line.
    """
    GENERATOR.check("generator", generator)
    DEVICE.check("device", device)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype; found {dtype!r}")
    legs.check(shape.modes)
    modes = shape.modes
    shape = legs.split(shape)  # from here on an ordinary network over the factors
    sizes = {**shape, **_ranks(legs, shape, rank)}
    legs.check_tied_sizes(sizes)
    check_full(legs, sizes, modes)
    _check_sizes(legs, sizes)
    hashes = make_hashes(legs.terms, sizes, legs.line or str(legs))
    tensors = get_start(init)(legs, sizes, shape.modes, normal_numbers(generator, device, dtype))
    if callable(init):
        _check_start(tensors, legs, sizes, device)
    tensors = start_vectors(hashes, legs.owners, tensors)
    target = torch.device(device) if device is not None else torch.get_default_device()
    made = [t.to(target, dtype).contiguous() for t in tensors]
    return sizes, [made[holder] for holder in legs.holders]


def _check_sizes(legs: Legs, sizes: Mapping[str, int]) -> None:
    """Refuse parameters with more entries than any memory holds.

    Raises:
        ValueError: the bytes of a parameter are no number of 64 bits.
    """
    for term in legs.terms:
        number = math.prod(sizes[leg] for leg in term.legs)
        if number >= 2**59:
            raise ValueError(
                f"({term}) would have {number:,} entries, more than 64 bits can address; lower its ranks, "
                f"or split its modes, in\n    {legs.line or legs}"
            )


def _check_start(
    found: Sequence[Tensor], legs: Legs, sizes: Mapping[str, int], device: object
) -> None:
    """Refuse what a start of the user returns, if it does not fit the line.

    Raises:
        TypeError: no list of tensors of real numbers.
        ValueError: another number of tensors, other shapes, or values that are missing or not finite.
    """
    line = legs.line or str(legs)
    if not isinstance(found, Sequence) or not all(isinstance(each, Tensor) for each in found):
        kinds = [type(t).__name__ for t in found] if isinstance(found, Sequence) else None
        raise TypeError(
            "init= has to return a list of torch tensors, one for each parameter of the line; found "
            f"{kinds or type(found).__name__}, in\n    {line}"
        )
    wanted = [tuple(sizes[leg] for leg in term.legs) for term in legs.terms]
    shapes = [tuple(each.shape) for each in found]
    if shapes != wanted:
        raise ValueError(
            f"init= has to return tensors of the shapes {wanted}; found {shapes}, in\n    {line}"
        )
    for term, each in zip(legs.terms, found):
        if each.is_complex():
            raise TypeError(f"init= has to return real numbers; found {each.dtype} for ({term})")
        if str(device).startswith("meta"):
            continue
        if each.is_meta or not bool(each.isfinite().all()):
            what = "one without values, on meta" if each.is_meta else "NaN or infinity"
            raise ValueError(f"init= has to return finite numbers; found {what} for ({term})")


def normal_numbers(
    generator: torch.Generator | None, device: torch.device | str | None, dtype: torch.dtype
) -> Callable[[Sequence[int]], torch.Tensor]:
    """Make a source of normal numbers: a function from a shape to a tensor, in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)  # QR needs at least float32
    if device is not None and torch.device(device).type == "meta":
        generator = None
    source = generator.device if generator is not None else device
    return lambda size: torch.randn(tuple(size), generator=generator, device=source, dtype=wide)


def _ranks(legs: Legs, shape: Shape, rank: Rank) -> dict[str, int]:
    asked = read_ranks(legs, shape.modes, rank)
    for vector in legs.vectors:
        asked.setdefault(vector, _entries_of_a_site(legs, vector, {**shape, **asked}))
    limits = legs.limits({**shape, **asked}, shape.modes)
    cut = [
        f"{bond} from {asked[bond]} to {limits[bond]}"
        for bond in legs.ranked(shape.modes)
        if limits[bond] < asked[bond]
    ]
    if cut:
        warnings.warn(
            f"ranks larger than the modes can fill were cut: {', '.join(cut)}, in\n    "
            f"{legs.line or legs}",
            stacklevel=outside(),
        )
    return limits


def _entries_of_a_site(legs: Legs, vector: str, sizes: Mapping[str, int]) -> int:
    """Count the entries that a vector has to give for one layer and matrix: its size by default."""
    apart = ("task", "layer", "expert", "matrix")
    terms = (term.legs for term in legs.terms if term.of == vector)
    return sum(math.prod(sizes[leg] for leg in own if leg not in apart) for own in terms)
