"""Registers the named formats, each of which is a line of legs; any other line works the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ._build import build
from ._factors import mode_of
from ._legs import Legs
from ._lines import (
    block_term_line,
    cara_line,
    cp_line,
    cp_matrix_line,
    folded_cp_line,
    indscal_line,
    jd_diag_line,
    jd_line,
    loretta_line,
    rescal_line,
    ring_line,
    tt_line,
    tt_lora_line,
    tt_ranks,
    tucker_line,
    tucker_ranks,
)
from ._modes import Shape, ShapeLike
from ._network import Network
from ._notation import abbreviated, closest
from ._ranks import Rank
from ._start import StartLike


@dataclass(frozen=True)
class Format:
    """A format: a named line of legs. Calling it makes a network, as `network` does with the line.

    Attributes:
        name: the name in the registry.
        about: one sentence that describes it, with its source.
        line: the line of legs, or a function from a `Shape`, whose split modes are there as their factors,
            to the line.
        read: a function that reads a tuple of ranks, if it is not in the order of the line.
        symmetric: whether one parameter serves both ``in`` and ``out``, which then need equal sizes.

    Example:
        >>> from lortalib.decomp import formats
        >>> formats["cp"]((6, 8, 4, 64, 16), rank=2).count()
        196
        >>> str(formats["lotr"].legs((6, 8, 4, 64, 16)))
        'in p, layer matrix p q, head out q'
    """

    name: str
    about: str
    line: str | Callable[[Shape], str]
    read: Callable[[Shape, Sequence[int]], Rank] | None = None
    symmetric: bool = False

    def legs(self, shape: ShapeLike) -> Legs:
        """Write the line for a tensor of this shape; without the mode ``head``, ``head out`` becomes ``out``.

        Factors of modes have their sizes in the line: those that the line or the shape gives, else balanced
        ones. A format whose line depends on the modes splits those that the shape splits.

        Args:
            shape: five sizes, or a mapping from mode names to sizes.

        Raises:
            LegsError: the line cannot be read, or its factors do not fit the shape.

        Example:
            >>> str(lora.legs({"layer": 2, "matrix": 4, "in": 8, "out": 8}))
            'layer matrix in r, layer matrix out r'
        """
        shape = shape if isinstance(shape, Shape) else Shape(shape)
        legs = Legs.parse(self.line(shape.split) if callable(self.line) else self.line)
        if "head" not in shape and not callable(self.line):
            outs = ({"head"} if "out" in map(mode_of, term.legs) else () for term in legs.terms)
            merged = tuple(term.without(gone) for term, gone in zip(legs.terms, outs))
            legs = Legs.parse(str(Legs(merged)))
        return legs.with_factors(legs.split(shape))

    def by_bond(self, shape: Shape, rank: Rank) -> Rank:
        """Return ranks as `network` takes them; Tucker takes one for each mode, in the order of the modes.

        Args:
            shape: the modes and their sizes.
            rank: ranks as the format takes them.

        Example:
            >>> from lortalib.decomp import get_format
            >>> get_format("tucker").by_bond(Shape({"layer": 3, "in": 8, "out": 4}), (2, 5, 4))
            {'t': 2, 'p': 5, 'q': 4}
        """
        if self.read is None or not isinstance(rank, Sequence):
            return rank
        return self.read(shape.split, rank)

    def __call__(
        self,
        shape: ShapeLike,
        rank: Rank,
        *,
        init: StartLike = "invariant",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Network:
        """Make a network of this format; arguments and errors are those of `network`.

        Example:
            >>> lotr((2, 4, 4, 32, 8), rank=3).ranks
            {'p': 3, 'q': 3}
        """
        shape = shape if isinstance(shape, Shape) else Shape(shape)
        return build(
            self.legs(shape),
            shape,
            self.by_bond(shape, rank),
            init=init,
            generator=generator,
            device=device,
            dtype=dtype,
        )


#: Every named format, by name. Entries are added with `register_format`.
formats: dict[str, Format] = {}


_ALIASES = {
    "lorta": "cp",
    "candecomp": "cp",
    "parafac": "cp",
    "metatt": "tt",
    "metatt_5d": "tt",
    "tensor_train": "tt",
    "symmetric": "indscal",
    "dedicom": "rescal",
    "tensor_ring": "ring",
    "tr": "ring",
    "fact_tt": "lotr",
    "btd": "block_term",
    "unilora": "uni_lora",
    "ttlora": "tt_lora",
    "loretta_rep": "loretta",
    "jd_full": "jd",
}


def register_format(
    name: str,
    line: str | Callable[[Shape], str],
    about: str = "",
    read: Callable[[Shape, Sequence[int]], Rank] | None = None,
    symmetric: bool = False,
) -> Format:
    """Register a line of legs as a named format, which `get_format` and ``lortalib.nn.apply`` then find.

    Args:
        name: letters, digits and underscores; hyphens become underscores, capitals small letters.
        line: the line of legs, or a function from a `Shape` to the line.
        about: one sentence, with its source.
        read: a function that reads a tuple of ranks; by default it is in the order of the line.
        symmetric: whether the format needs ``in`` and ``out`` of equal size.

    Raises:
        ValueError: the name is taken.
        LegsError: the line cannot be read.

    Example:
        >>> _ = register_format("layerwise", "layer in r, layer matrix head out r", "A shared by q, k, v")
        >>> get_format("layerwise")((2, 2, 4, 8, 4), 3).count()
        240
        >>> del formats["layerwise"]
    """
    key = _key(name)
    if key in formats or key in _ALIASES:
        raise ValueError(
            f"the format name {name!r} is taken; del lortalib.decomp.formats[{key!r}] frees it"
        )
    if isinstance(line, str):
        Legs.parse(line)
    formats[key] = Format(key, about, line, read, symmetric)
    return formats[key]


def get_format(name: str) -> Format:
    """Find a format by its name, or make a nameless one from a line of legs.

    Args:
        name: a name, in any spelling of case, ``-`` and ``_``; or a line of legs.

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
        tied = any(term.tied for term in Legs.parse(name).terms)
        return Format("", "a line of legs", name, symmetric=tied)
    known = ", ".join([*formats, *_ALIASES])
    raise ValueError(
        f"unknown decomposition {abbreviated(name)}{closest(key, [*formats, *_ALIASES])}; the names "
        f"are {known}. Or give a line of legs, such as 'in r, out r, head r, layer r, matrix r'."
    )


def names_format(text: str) -> bool:
    """Return True if a text is the name of a format and not a line of legs."""
    return _key(text) in {**formats, **_ALIASES}


def _key(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(
            f"a format is given as a text, its name or a line of legs; found {type(name).__name__}"
        )
    return name.strip().lower().replace("-", "_")


register_format("cp", cp_line, "CP (canonical polyadic); LoRTA, arXiv 2410.04060")


cp_matrix = register_format(
    "cp_matrix", cp_matrix_line, "CP of each slice T[matrix]: q, k, v and o share nothing"
)


register_format("tucker", tucker_line, "Tucker: a factor for each mode and one core", tucker_ranks)


register_format("tt", tt_line, "tensor train in the order of MetaTT-5D, arXiv 2506.09105", tt_ranks)


metatt_4d = register_format(
    "metatt_4d",
    "in a, layer a b, matrix b c, head out c",
    "MetaTT-4D, arXiv 2506.09105: heads not treated apart",
)


metatt_41d = register_format(
    "metatt_41d",
    "in a, layer a b, task b c, matrix c d, head out d",
    "MetaTT-(4+1)D, arXiv 2506.09105: several tasks",
)


ring = register_format("ring", ring_line, "tensor ring: a train whose ends are joined")


lotr = register_format(
    "lotr", "in p, layer matrix p q, head out q", "LoTR, arXiv 2402.01376; FacT-TT"
)


fact_tk = register_format(
    "fact_tk", "in p, head out q, layer matrix s, p q s", "FacT-TK, arXiv 2212.03145"
)


cara = register_format("cara", cara_line, "CaRA, its attention part")


lora = register_format(
    "lora", "layer matrix in r, layer matrix head out r", "LoRA, arXiv 2106.09685"
)


lora_xs = register_format(
    "lora_xs",
    "layer matrix in p (frozen), layer matrix p q, layer matrix head out q (frozen)",
    "LoRA-XS, arXiv 2405.17604, its frozen sides random unless set",
)


uni_lora = register_format(
    "uni_lora",
    "layer matrix in r (of n), layer matrix head out r (of n, zero)",
    "Uni-LoRA, arXiv 2506.00799: all factors of LoRA are entries of one trained vector",
)


vera = register_format(
    "vera",
    "in r (frozen), head out r (frozen), layer matrix r",
    "VeRA, arXiv 2310.11454, without its output vector",
)


folded_cp = register_format(
    "folded_cp", folded_cp_line, "CP over folded matrices: a factor for each digit of in and out"
)


tt_lora = register_format(
    "tt_lora", tt_lora_line, "TT-LoRA, arXiv 2408.01008: a train over each folded matrix"
)


loretta = register_format(
    "loretta",
    loretta_line,
    "LoRETTA_rep, arXiv 2402.11417: a train over each of the two folded matrices of a LoRA",
)


jd = register_format(
    "jd",
    jd_line,
    "joint diagonalisation, JD-Full of arXiv 2407.00066: adapters share the two sides of a weight",
)


jd_diag = register_format(
    "jd_diag", jd_diag_line, "joint diagonalisation with diagonal cores (JD-Diag, arXiv 2407.00066)"
)


block_term = register_format("block_term", block_term_line, "block term: n Tucker tensors added up")


indscal = register_format(
    "indscal",
    indscal_line,
    "INDSCAL (Carroll and Chang 1970): symmetric slices A^T diag(c) A, one A for all",
    symmetric=True,
)


rescal = register_format(
    "rescal",
    rescal_line,
    "RESCAL (Nickel et al. 2011), DEDICOM: slices A^T C A, one A for all",
    symmetric=True,
)
