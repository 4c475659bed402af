"""Formats: each is a line of legs. The registry names them; any other line works the same way."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch

from ._initial import StartLike, as_start
from ._legs import Legs
from ._modes import Shape, ShapeLike
from ._network import Network

Rank = Union[int, Sequence[int], Mapping[str, int]]

#: The order of a tensor train: that of MetaTT-5D and, with a task, of MetaTT-(4+1)D.
_TRAIN = ("in", "layer", "task", "expert", "matrix", "head", "out")
_TUCKER = dict(zip(("in", "out", "head", "layer", "matrix", "task", "expert"), "pqstuvw"))


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
        legs: the line, for instance ``"in p, layer matrix p q, head out q"``; a parameter may
            be marked ``(frozen)`` or ``(zero)``. The name of a format stands for its line.
        shape: ``(layers, heads, matrices, in, out)``, or a mapping from mode names to sizes.
        rank: one size for every bond, one for each bond in the order in which they first appear
            in the line, or a mapping from bond to size. Ranks beyond what the modes can fill
            are cut, with a warning, as TensorLy does.
        init: ``"invariant"`` (zero update; first step independent of the rank), ``"lorta"`` (the
            published start), ``"normal"`` (random, nothing zero), or a callable
            ``(legs, sizes, modes, randn) -> tensors``.
        generator: source of randomness; torch's global one by default.
        device, dtype: of the parameters; float32 by default. ``device="meta"`` allocates nothing.

    Raises:
        LegsError: the line cannot be read or does not fit the shape.
        ValueError: a rank below 1, a wrong number of ranks, an unknown bond or init.
        TypeError: a dtype that is no floating-point one.

    Example:
        >>> net = network("in p, layer matrix p q, head out q", (12, 12, 2, 768, 64), 4)
        >>> net.count(), net.dense().abs().max().item()
        (6528, 0.0)
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype; found {dtype!r}")
    if isinstance(legs, str) and _key(legs) in {**formats, **_ALIASES}:
        options = {"init": init, "generator": generator, "device": device, "dtype": dtype}
        return get_format(legs)(shape, rank, **options)
    legs = Legs.parse(legs) if isinstance(legs, str) else legs
    shape = shape if isinstance(shape, Shape) else Shape(shape)
    legs.check(shape.modes)
    sizes = {**shape, **_ranks(legs, shape, rank)}
    tensors = as_start(init)(legs, sizes, shape.modes, _randn(generator, device, dtype))
    target = torch.device(device) if device is not None else torch.get_default_device()
    return Network(legs, [t.to(target, dtype).contiguous() for t in tensors], shape.modes)


def _randn(
    generator: torch.Generator | None, device: torch.device | str | None, dtype: torch.dtype
) -> Callable[[Sequence[int]], torch.Tensor]:
    wide = torch.promote_types(dtype, torch.float32)  # QR wants at least float32
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
            stacklevel=4,
        )
    return limits


@dataclass(frozen=True)
class Format:
    """A named format: calling it makes a network, as `network` does with its line.

    Attributes:
        name: the name in the registry.
        about: what it is, with its source.
        line: the line of legs, or a function from a `Shape` to the line.
        read: how a rank given as a tuple is read, where it is not in the order of the line.
    """

    name: str
    about: str
    line: str | Callable[[Shape], str]
    read: Callable[[Shape, Sequence[int]], Rank] | None = None

    def legs(self, shape: ShapeLike) -> Legs:
        """The line for a tensor of this shape; ``head out`` is ``out`` where there are no heads."""
        shape = shape if isinstance(shape, Shape) else Shape(shape)
        if callable(self.line):
            return Legs.parse(self.line(shape))
        legs = Legs.parse(self.line)
        if "head" in shape:
            return legs
        merged = (term.without({"head"} if "out" in term.legs else ()) for term in legs.terms)
        return Legs.parse(str(Legs(tuple(merged))))

    def __call__(self, shape: ShapeLike, rank: Rank, **options: Any) -> Network:
        """Make a network of this format; the arguments are those of `network`."""
        shape = shape if isinstance(shape, Shape) else Shape(shape)
        if self.read is not None and isinstance(rank, Sequence):
            rank = self.read(shape, rank)
        return network(self.legs(shape), shape, rank, **options)


def _cp_line(shape: Shape) -> str:
    modes = _ordered(shape, ("in", "out", "head", "layer", "matrix", "task", "expert"))
    bond = _fresh(shape, "r")
    return ", ".join(f"{mode} {bond}" for mode in modes)


def _cp_matrix_line(shape: Shape) -> str:
    slices = Shape({mode: size for mode, size in shape.items() if mode != "matrix"})
    own = "matrix " * ("matrix" in shape)
    return ", ".join(own + term for term in _cp_line(slices).split(", "))


def _tucker_bonds(shape: Shape) -> dict[str, str]:
    free = iter("abcdefghijklmno")
    return {mode: _fresh(shape, _TUCKER.get(mode) or next(free)) for mode in shape}


def _tucker_line(shape: Shape) -> str:
    bonds = _tucker_bonds(shape)
    modes = _ordered(shape, tuple(_TUCKER))
    factors = [f"{mode} {bonds[mode]}" for mode in modes]
    return ", ".join([*factors, " ".join(bonds[mode] for mode in modes)])


def _tt_line(shape: Shape) -> str:
    return train_line(_ordered(shape, _TRAIN), shape)


def train_line(modes: Sequence[str], shape: Shape) -> str:
    """The line of a tensor train through ``modes`` in this order."""
    bonds = [_fresh(shape, letter) for letter in "abcdefghijklmnop"[: len(modes) - 1]]
    left, right = ["", *bonds], [*bonds, ""]
    return ", ".join(" ".join(filter(None, legs)) for legs in zip(modes, left, right))


def _ordered(shape: Shape, order: Sequence[str]) -> list[str]:
    known = [mode for mode in order if mode in shape]
    return known + [mode for mode in shape if mode not in order]


def _fresh(shape: Shape, name: str) -> str:
    while name in shape:
        name += "_"
    return name


def _tucker_ranks(shape: Shape, rank: Sequence[int]) -> Rank:
    """One rank for each axis of the tensor, as TensorLy reads them."""
    if len(rank) != len(shape):
        raise ValueError(
            f"{len(rank)} Tucker ranks were given, {tuple(rank)}, for the {len(shape)} modes "
            f"{', '.join(shape)}"
        )
    return {bond: rank[k] for k, bond in enumerate(_tucker_bonds(shape).values())}


def _tt_ranks(shape: Shape, rank: Sequence[int]) -> Rank:
    """The inner ranks along the train; TensorLy's outer ranks of 1 may stand around them."""
    if len(rank) == len(shape) + 1 and rank[0] == rank[-1] == 1:
        return tuple(rank[1:-1])
    return rank


#: Every named format, by name. Entries are added with `register`.
formats: dict[str, Format] = {}

_ALIASES = {
    "lorta": "cp",
    "candecomp": "cp",
    "parafac": "cp",
    "metatt": "tt",
    "metatt_5d": "tt",
    "tensor_train": "tt",
    "tensor_ring": "ring",
    "tr": "ring",
    "fact_tt": "lotr",
    "btd": "block_term",
}


def register_format(
    name: str,
    line: str | Callable[[Shape], str],
    about: str = "",
    read: Callable[[Shape, Sequence[int]], Rank] | None = None,
) -> Format:
    """Give a line of legs a name, under which `get_format` and ``lortalib.nn.apply`` find it.

    Args:
        name: letters, digits and underscores; hyphens and capitals are read as such.
        line: the line of legs, or a function from a `Shape` to the line.
        about: one sentence, with its source.
        read: how a tuple of ranks is read; in the order of the line by default.

    Raises:
        ValueError: the name is taken.
        LegsError: the line cannot be read.

    Example:
        >>> _ = register("layerwise", "layer in r, layer matrix head out r", "A shared by q, k, v")
        >>> get_format("layerwise")((2, 2, 4, 8, 4), 3).count()
        240
        >>> del registry["layerwise"]
    """
    key = _key(name)
    if key in formats or key in _ALIASES:
        raise ValueError(f"the format name {name!r} is taken; del registry[{key!r}] frees it")
    if isinstance(line, str):
        Legs.parse(line)
    formats[key] = Format(key, about, line, read)
    return formats[key]


def get_format(name: str) -> Format:
    """The format of this name, or, where a line of legs is given, a nameless one with that line.

    Raises:
        ValueError: neither a known name nor a line of legs.

    Example:
        >>> get_format("LoRA-XS").name, get_format("in r, head out r, layer matrix r").name
        ('lora_xs', '')
    """
    key = _key(name)
    key = _ALIASES.get(key, key)
    if key in formats:
        return formats[key]
    if "," in name or " " in name:
        Legs.parse(name)
        return Format("", "a line of legs", name)
    known = ", ".join([*formats, *_ALIASES])
    close = difflib.get_close_matches(key, [*formats, *_ALIASES], 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(
        f"unknown decomposition {name!r}{hint}; the names are {known}. Or give a line of legs, "
        "such as 'in r, out r, head r, layer r, matrix r'."
    )


def _key(name: str) -> str:
    return name.strip().lower().replace("-", "_")


register_format("cp", _cp_line, "CP (canonical polyadic); LoRTA, arXiv 2410.04060")
register_format(
    "cp_matrix", _cp_matrix_line, "CP of each slice T[matrix]: q, k, v and o share nothing"
)
register_format(
    "tucker", _tucker_line, "Tucker: a factor for each mode and one core", _tucker_ranks
)
register_format(
    "tt", _tt_line, "tensor train in the order of MetaTT-5D, arXiv 2506.09105", _tt_ranks
)
register_format(
    "metatt_4d",
    "in a, layer a b, matrix b c, head out c",
    "MetaTT-4D, arXiv 2506.09105: heads not treated apart",
)
register_format(
    "metatt_41d",
    "in a, layer a b, task b c, matrix c d, head out d",
    "MetaTT-(4+1)D, arXiv 2506.09105: several tasks",
)
register_format(
    "ring",
    "in e a, layer a b, matrix b c, head c d, out d e",
    "tensor ring: a train whose ends are joined",
)
register_format("lotr", "in p, layer matrix p q, head out q", "LoTR, arXiv 2402.01376; FacT-TT")
register_format("fact_tk", "in p, head out q, layer matrix s, p q s", "FacT-TK, arXiv 2212.03145")
register_format("cara", "in r, out r, head r, layer matrix r", "CaRA, its attention part")
register_format("lora", "layer matrix in r, layer matrix head out r", "LoRA, arXiv 2106.09685")
register_format(
    "lora_xs",
    "layer matrix in p (frozen), layer matrix p q, layer matrix head out q (frozen)",
    "LoRA-XS, arXiv 2405.17604, its frozen sides random unless set",
)
register_format(
    "vera",
    "in r (frozen), head out r (frozen), layer matrix r",
    "VeRA, arXiv 2310.11454, without its output vector",
)
register_format(
    "block_term",
    "in p n, out q n, head s n, layer t n, matrix u n, p q s t u n",
    "block term: n Tucker tensors added up",
)


def cp(shape: ShapeLike, rank: int, **options: Any) -> Network:
    """CP decomposition, one factor for each mode: LoRTA (arXiv 2410.04060).

        T[l, h, m, i, o] = sum_r  L[l, r] H[h, r] M[m, r] A[i, r] B[o, r]

    Args:
        shape: ``(layers, heads, matrices, in, out)`` or a mapping from modes to sizes.
        rank: the number of components, shared by all modes.
        options: ``init``, ``generator``, ``device``, ``dtype`` of `network`.

    Returns:
        A `Network` of ``rank * (layers + heads + matrices + in + out)`` numbers.

    Raises:
        ValueError: a rank below 1; see `network`.

    Example:
        >>> cp((12, 12, 4, 768, 64), rank=4).count()
        3440
    """
    return formats["cp"](shape, rank, **options)


def tucker(shape: ShapeLike, rank: Rank, **options: Any) -> Network:
    """Tucker decomposition: a factor for each mode and a core that joins them all.

    Args:
        shape: ``(layers, heads, matrices, in, out)`` or a mapping from modes to sizes.
        rank: one integer for all modes (cut to the size of short modes, with a warning), a tuple
            in the order of the shape's modes as in TensorLy, or a mapping from the bonds
            p (in), q (out), s (head), t (layer), u (matrix) to sizes.
        options: ``init``, ``generator``, ``device``, ``dtype`` of `network`.

    Raises:
        ValueError: a rank below 1, a wrong number of ranks; see `network`.

    Example:
        >>> tucker((12, 12, 4, 768, 64), rank=(3, 2, 2, 8, 8)).ranks
        {'p': 8, 'q': 8, 's': 2, 't': 3, 'u': 2}
    """
    return formats["tucker"](shape, rank, **options)


def tt(shape: ShapeLike, rank: Rank, **options: Any) -> Network:
    """Tensor train in the order in, layer, (task, expert,) matrix, head, out: MetaTT-5D.

    Args:
        shape: ``(layers, heads, matrices, in, out)`` or a mapping from modes to sizes.
        rank: one integer for all bonds, a tuple along the train (with or without the outer ones of
            TensorLy), or a mapping from bonds a, b, c, ... to sizes.
        options: ``init``, ``generator``, ``device``, ``dtype`` of `network`.

    Raises:
        ValueError: a rank below 1, a wrong number of ranks; see `network`.

    Example:
        >>> tt((12, 12, 2, 768, 64), rank=16).count()
        19968
    """
    return formats["tt"](shape, rank, **options)
