"""Defines the configuration of the method, in the terms that PEFT's users know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from reprlib import repr as short
from typing import Any, Union

from peft import PeftConfig

from .._kinds import is_integer
from ..decomp import Legs, get_format
from ..nn.door import LORA_WORDS, check_settings
from ._peft_type import peft_type

#: The largest size of a bond: every model's width is smaller, and a larger bond adds no expressiveness.
_LARGEST_BOND = 2**16
#: Arguments of other methods that have no meaning here, each with the reason.
_REFUSED = {
    "rank_pattern": "all modules of a group share one tensor, whose rank cannot differ by module; give "
    "rank a mapping from bonds to sizes, or use two adapters",
    "alpha_pattern": "all modules of a group share one tensor and one scaling; use two adapters",
    "target_parameters": "packed experts are not adapted through PEFT; use lortalib.nn.apply, which "
    "finds them by itself",
    **LORA_WORDS,
    "init_lora_weights": "the start is called init_weights",
}


def _are(fits: Callable[[object], bool], value: object) -> bool:
    """Return True if a value is a list of values that fit; a text does not count as a list of letters."""
    return isinstance(value, (list, tuple, set)) and all(map(fits, value))


def _are_names(value: object) -> bool:
    return _are(lambda each: isinstance(each, str) and each != "", value)


def _are_named(fits: Callable[[object], bool], value: object) -> bool:
    """Return True if a value is a mapping from names to values that fit."""
    return isinstance(value, Mapping) and _are_names([*value]) and all(map(fits, value.values()))


def _are_sizes(value: object) -> bool:
    return _are_named(is_integer, value)


def _are_integers(value: object) -> bool:
    return _are(is_integer, value)


_A_PATTERN_OR_NAMES: tuple[Callable[[Any], bool], str] = (
    lambda value: value is None or isinstance(value, str) or _are_names(value),
    "a list of names, one text (a regular expression), or None",
)
#: A check for each field, and its description. Configurations are read from files of other people.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (
        lambda value: is_integer(value) or _are_sizes(value),
        "an integer, or a mapping from bonds to integers",
    ),
    "decomposition": (
        lambda value: isinstance(value, str),
        "a text: the name of a format, or a line of legs",
    ),
    "target_modules": _A_PATTERN_OR_NAMES,
    "exclude_modules": _A_PATTERN_OR_NAMES,
    "layers_to_transform": (
        lambda value: value is None or is_integer(value) or _are_integers(value),
        "an integer, a list of integers, or None",
    ),
    "layers_pattern": (
        lambda value: value is None or isinstance(value, str) or _are_names(value),
        "a name, a list of names, or None",
    ),
    "modules_to_save": (
        lambda value: value is None or _are_names(value),
        "a list of names, or None",
    ),
    "trainable_token_indices": (
        lambda value: value is None or _are_integers(value) or _are_named(_are_integers, value),
        "a list of integers, a mapping from names of embeddings to such lists, or None",
    ),
    "init_weights": (
        lambda value: isinstance(value, (bool, str)),
        "True, False, or the name of a start",
    ),
    "ranks": (
        lambda value: value is None or _are_named(_are_sizes, value),
        "a mapping from networks to mappings from bonds to integers, or None",
    ),
    "description": (
        lambda value: value is None or isinstance(value, Mapping),
        "what lortalib wrote there, or None",
    ),
}


@dataclass
class LortaConfig(PeftConfig):
    """Configures one low-rank tensor for all target modules of a model (LoRTA, arXiv 2410.04060).

    Attention and MLP projections that lortalib finds in the model share one tensor for each size, with the
    modes layer, head and matrix, as with `lortalib.nn.apply`; any other linear module is a matrix with one
    head.

    Args:
        rank: size of the bonds: one integer, or a mapping from bond to size, which may also give the
            vectors of hashed parameters (``{"r": 4, "n": 4096}``).
        decomposition: a registered name (``"cp"``, ``"tucker"``, ``"tt"``, ...) or a line of legs.
        alpha: the update is ``alpha * T``; only ``init_weights="lorta"`` divides it by the rank.
        dropout: probability of dropping an input feature of the adapter in training.
        target_modules: names (ends of paths) or roles, a regular expression, ``"all-linear"``, or as for
            `lortalib.nn.apply` letters out of ``"qkvo"``, ``"mlp"``, ``"all"``. By default all attention
            projections of a transformers model.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: layers to adapt, by index; all by default.
        layers_pattern: name of the list of layers, if PEFT cannot find it.
        modules_to_save: modules that train as a whole and are saved with the adapter.
        trainable_token_indices: rows of the embedding that train, as PEFT defines it.
        init_weights: True or ``"invariant"`` (no update at first; the effect of the first step does not
            depend on the rank), False or ``"normal"`` (random), ``"lorta"`` (the published initialization).
        gqa: ``"pool"`` or ``"split"``, as for `lortalib.nn.apply`.
        acts_on: ``"weights"`` or ``"stream"``; the default depends on the format, as for
            `lortalib.nn.apply`.
        bias: only ``"none"``, for configurations that state it.
        ranks: sizes of the bonds of each network by name; ``add_weighted_adapter`` writes them.
        description: a description of the adapter's networks, which lortalib writes when it makes the
            adapter, so that its folder can be read without PEFT or a model (see `lortalib.nn.read`).

    Raises:
        ValueError: a value is bad, a bond is above 65,536, or an argument has no meaning for a shared tensor.
        TypeError: a value has another type, or ``bias`` is not ``"none"``.

    Example:
        >>> LortaConfig(rank=4, target_modules=["q_proj", "v_proj"]).peft_type.value
        'LORTA'
        >>> LortaConfig(rank_pattern={"q_proj": 2})
        Traceback (most recent call last):
            ...
        ValueError: rank_pattern is not supported: all modules of a group share one tensor, ...
    """

    rank: Union[int, dict[str, int]] = 16
    decomposition: str = "indscal"
    alpha: float = 1.0
    dropout: float = 0.0
    target_modules: Union[list[str], str] | None = None
    exclude_modules: Union[list[str], str] | None = None
    layers_to_transform: Union[list[int], int] | None = None
    layers_pattern: Union[list[str], str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: Union[list[int], dict[str, list[int]]] | None = None
    init_weights: Union[bool, str] = True
    gqa: str = "pool"
    acts_on: str | None = None
    ranks: dict[str, dict[str, int]] | None = None
    description: dict[str, Any] | None = field(default=None, repr=False)
    bias: InitVar[str] = "none"
    rank_pattern: InitVar[Any] = None
    alpha_pattern: InitVar[Any] = None
    target_parameters: InitVar[Any] = None
    r: InitVar[Any] = None
    lora_alpha: InitVar[Any] = None
    lora_dropout: InitVar[Any] = None
    use_rslora: InitVar[Any] = None
    use_dora: InitVar[Any] = None
    init_lora_weights: InitVar[Any] = None

    def __post_init__(self, bias: str, *refused: Any) -> None:
        super().__post_init__()
        if bias != "none":
            raise TypeError(
                f"LortaConfig has no bias={bias!r}: merging and exporting as a LoRA need biases left "
                "alone. Modules that shall train as a whole go into modules_to_save"
            )
        self.peft_type = peft_type()
        for (name, why), value in zip(_REFUSED.items(), refused):
            if value:
                raise ValueError(f"{name} is not supported: {why}")
        for name, (fits, what) in _KINDS.items():
            if not fits(getattr(self, name)):
                raise TypeError(f"{name} must be {what}; found {short(getattr(self, name))}")
        _check_bonds(self)
        for name in ("target_modules", "exclude_modules"):
            if _are_names(getattr(self, name)):
                setattr(self, name, set(getattr(self, name)))
        check_settings(self.alpha, self.dropout, self.start, self.acts_on)
        if self.gqa not in ("pool", "split"):
            raise ValueError(f"gqa must be 'pool' or 'split'; found {self.gqa!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must be too."
            )
        for given in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, given) is not None:
                raise ValueError(f"`{given}` cannot be used when `target_modules` is a str.")

    @property
    def start(self) -> str:
        """The name that `lortalib.nn.apply` has for the initialization that ``init_weights`` chooses."""
        if isinstance(self.init_weights, bool):
            return "invariant" if self.init_weights else "normal"
        return self.init_weights


def _check_bonds(config: LortaConfig) -> None:
    """Refuse bonds that are too large, so that a file of other people cannot ask for any amount of memory.
    The vectors of hashed parameters may be longer, and are cut at the number of hashed entries."""
    sizes = [config.rank] if isinstance(config.rank, int) else []
    mappings = [config.rank] if isinstance(config.rank, dict) else []
    for mapping in (*mappings, *(config.ranks or {}).values()):
        vectors = _vectors(config.decomposition) if mapping else set()
        sizes += [size for name, size in mapping.items() if name not in vectors]
    largest = max(sizes, default=0)
    if largest > _LARGEST_BOND:
        raise ValueError(
            f"rank must be at most {_LARGEST_BOND:,} for every bond; found {largest:,}. A larger bond adds "
            "nothing: no model is as wide"
        )


def _vectors(decomposition: str) -> set[str]:
    """Find the names of the vectors in a line of legs."""
    try:
        line = get_format(decomposition).line
    except ValueError:  # a wrong line is refused later, together with the model
        return set()
    return set(Legs.parse(line).vectors) if isinstance(line, str) else set()
