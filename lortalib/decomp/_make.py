"""Makes networks: from a line of legs, or from the name of a format."""

from __future__ import annotations

import torch

from ._build import build
from ._formats import formats, get_format, names_format
from ._legs import Legs
from ._modes import Shape, ShapeLike
from ._network import Network
from ._ranks import Rank
from ._start import StartLike


def network(
    legs: str | Legs,
    shape: ShapeLike,
    rank: Rank,
    *,
    init: StartLike = "invariant",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """Make the network that a line of legs describes, with starting values.

    Args:
        legs: the line, for instance ``"in p, layer matrix p q, head out q"``, or the name of a
            format. A parameter may be marked, as ``(frozen)``, ``(zero)``, ``(shared)``, ``(tied)`` or
            ``(of n)``.
        shape: ``(layers, heads, matrices, in, out)``, or a mapping from mode names to sizes.
        rank: one size for every bond, one for each bond in the order in which they first appear
            in the line, or a mapping from bond to size. The vectors of parameters marked ``(of n)`` stand
            among the bonds; one whose size is not given has as many numbers as one layer and matrix has
            entries of it. As in TensorLy, ranks larger than the modes can fill are reduced, with a warning.
        init: ``"invariant"`` (the update is zero, the first step independent of the rank), ``"lorta"``
            (LoRTA's published start), ``"normal"`` (random, nothing zero), or a callable
            ``(legs, sizes, modes, randn) -> tensors``.
        generator: the source of randomness; by default torch's global one.
        device, dtype: device and dtype of the parameters; float32 by default. ``device="meta"``
            allocates nothing.

    Raises:
        LegsError: the line cannot be read or does not fit the shape.
        ValueError: a rank below 1, a wrong number of ranks, an unknown bond or init, or no parameter that
            can start at zero, with an init that needs one.
        TypeError: a dtype that is not floating-point.

    Example:
        >>> net = network("in p, layer matrix p q, head out q", (12, 12, 2, 768, 64), 4)
        >>> net.count(), net.dense().abs().max().item()
        (6528, 0.0)
    """
    shape = shape if isinstance(shape, Shape) else Shape(shape)
    if isinstance(legs, str) and names_format(legs):
        made = get_format(legs)
        return made(shape, rank, init=init, generator=generator, device=device, dtype=dtype)
    parsed = Legs.parse(legs) if isinstance(legs, str) else legs
    if not isinstance(parsed, Legs):
        raise TypeError(
            "legs are a line such as 'in r, out r', the name of a format, or Legs; found "
            f"{type(parsed).__name__}"
        )
    return build(parsed, shape, rank, init=init, generator=generator, device=device, dtype=dtype)


def cp(
    shape: ShapeLike,
    rank: int,
    *,
    init: StartLike = "invariant",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """Make a CP decomposition: one factor for each mode, as in LoRTA (arXiv 2410.04060).

        T[l, h, m, i, o] = sum_r  L[l, r] H[h, r] M[m, r] A[i, r] B[o, r]

    Args:
        shape: ``(layers, heads, matrices, in, out)`` or a mapping from modes to sizes.
        rank: the number of components.
        init, generator, device, dtype: as for `network`.

    Returns:
        A `Network` of ``rank * (layers + heads + matrices + in + out)`` trainable parameters.

    Raises:
        ValueError: a rank below 1; see `network`.

    Example:
        >>> cp((12, 12, 4, 768, 64), rank=4).count()
        3440
    """
    return formats["cp"](shape, rank, init=init, generator=generator, device=device, dtype=dtype)


def tucker(
    shape: ShapeLike,
    rank: Rank,
    *,
    init: StartLike = "invariant",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """Make a Tucker decomposition: one factor for each mode and a core that joins them all.

    Args:
        shape: ``(layers, heads, matrices, in, out)`` or a mapping from modes to sizes.
        rank: one integer for all modes (reduced to the size of shorter modes, with a warning), a tuple
            in the order of the shape's modes as in TensorLy, or a mapping from the bonds
            p (in), q (out), s (head), t (layer), u (matrix) to sizes.
        init, generator, device, dtype: as for `network`.

    Raises:
        ValueError: a rank below 1, a wrong number of ranks; see `network`.

    Example:
        >>> tucker((12, 12, 4, 768, 64), rank=(3, 2, 2, 8, 8)).ranks
        {'p': 8, 'q': 8, 's': 2, 't': 3, 'u': 2}
    """
    return formats["tucker"](
        shape, rank, init=init, generator=generator, device=device, dtype=dtype
    )


def tt(
    shape: ShapeLike,
    rank: Rank,
    *,
    init: StartLike = "invariant",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """Make a tensor train in the order in, layer, (task, expert,) matrix, head, out, as in MetaTT-5D.

    Args:
        shape: ``(layers, heads, matrices, in, out)`` or a mapping from modes to sizes.
        rank: one integer for all bonds, a tuple along the train (with or without TensorLy's outer
            ranks of 1), or a mapping from bonds a, b, c, ... to sizes.
        init, generator, device, dtype: as for `network`.

    Raises:
        ValueError: a rank below 1, a wrong number of ranks; see `network`.

    Example:
        >>> tt((12, 12, 2, 768, 64), rank=16).count()
        19968
    """
    return formats["tt"](shape, rank, init=init, generator=generator, device=device, dtype=dtype)
