"""Builds a network from a parsed line of legs: checks the ranks and makes the starting values."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Union

import torch

from ._legs import Legs
from ._modes import Shape
from ._network import Network
from ._start import StartLike, get_start

#: A rank is one size for every bond, one size for each bond in the order of the line, or a mapping from
#: bond to size.
Rank = Union[int, Sequence[int], Mapping[str, int]]

_PACKAGE = str(Path(__file__).parents[1]) + os.sep


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
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype; found {dtype!r}")
    legs.check(shape.modes)
    sizes = {**shape, **_ranks(legs, shape, rank)}
    legs.check_tied_sizes(sizes)
    tensors = get_start(init)(legs, sizes, shape.modes, _randn(generator, device, dtype))
    target = torch.device(device) if device is not None else torch.get_default_device()
    made = [t.to(target, dtype).contiguous() for t in tensors]
    return Network(legs, [made[owner] for owner in legs.owners], shape.modes)


def _randn(
    generator: torch.Generator | None, device: torch.device | str | None, dtype: torch.dtype
) -> Callable[[Sequence[int]], torch.Tensor]:
    wide = torch.promote_types(dtype, torch.float32)  # QR needs at least float32
    if device is not None and torch.device(device).type == "meta":
        generator = None
    source = generator.device if generator is not None else device
    return lambda size: torch.randn(tuple(size), generator=generator, device=source, dtype=wide)


def _ranks(legs: Legs, shape: Shape, rank: Rank) -> dict[str, int]:
    bonds = legs.bonds(shape.modes)
    line = legs.line or str(legs)
    if isinstance(rank, Mapping):
        if set(rank) != set(bonds):
            raise ValueError(
                f"ranks were given for {', '.join(rank) or 'no bond'}; the bonds are "
                f"{', '.join(bonds) or 'none'}, in\n    {line}"
            )
        asked = {bond: rank[bond] for bond in bonds}
    elif isinstance(rank, Sequence) and not isinstance(rank, str):
        if len(rank) != len(bonds):
            raise ValueError(
                f"{len(rank)} ranks were given, {tuple(rank)}; there are {len(bonds)} bonds "
                f"({', '.join(bonds)}), in\n    {line}"
            )
        asked = dict(zip(bonds, rank))
    else:
        asked = dict.fromkeys(bonds, rank)
    for bond, size in asked.items():
        if isinstance(size, bool) or not hasattr(size, "__index__") or size < 1:
            raise ValueError(f"the rank of bond {bond!r} must be an integer >= 1; found {size!r}")
    asked = {bond: int(size) for bond, size in asked.items()}
    limits = legs.limits({**shape, **asked}, shape.modes)
    cut = [
        f"{bond} from {asked[bond]} to {limits[bond]}"
        for bond in bonds
        if limits[bond] < asked[bond]
    ]
    if cut:
        warnings.warn(
            f"ranks larger than the modes can fill were cut: {', '.join(cut)}, in\n    {line}",
            stacklevel=outside(),
        )
    return limits


def outside() -> int:
    """Return the stacklevel of the first caller outside this library, so that a warning names their line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level
