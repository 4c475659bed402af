"""Reads the configuration of a LoRA of PEFT: the scaling of each pair, and variants that are refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

from .._hub import local_folder
from .folder import AdapterFileError, read_json
from .records import short

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

#: Fields that make an update something other than the product of its pair, with the reason.
_REFUSED = {
    "use_dora": "DoRA rescales whole weights",
    "lora_bias": "it trains biases",
    "target_parameters": "it adapts packed parameters",
    "layer_replication": "it copies layers of the base",
    "trainable_token_indices": "it trains rows of an embedding",
    "use_qalora": "QALoRA pools the input",
    "alora_invocation_tokens": "activated LoRA acts behind certain tokens only",
    "arrow_config": "Arrow chooses among several LoRAs",
    "kasa_config": "KaSA changes the base's weights",
    "monteclora_config": "MonteCLoRA draws random numbers",
    "use_bdlora": "BD-LoRA stores its pairs in blocks",
}
#: Starts that subtract something from the base's weights when PEFT loads them.
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_MOST_ENTRIES = 10_000
#: The fields on which the pairs depend. Others, such as the names of models, may be edited.
_SEALED = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "fan_in_fan_out", "rank_pattern",
    "alpha_pattern", "target_modules", "modules_to_save",
)  # fmt: skip


def lora_config(
    folder: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> dict[str, Any]:
    """Read the configuration of a LoRA's folder, and check it.

    Args:
        folder: a folder that `export_lora` or PEFT wrote, or a repository of the hub.
        revision: a branch, tag or commit of the repository; by default ``main``.
        token: a token of the hub; by default the one that ``hf auth login`` stored.
        subfolder: the folder in the repository, or below a local folder, that has the files.

    Returns:
        The fields of ``adapter_config.json``; ``"r"`` is the rank.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: the file is damaged, of another method, or of a LoRA that is more than
            low-rank pairs.

    Example:
        >>> import tempfile, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> folder = lortalib.nn.apply(model, "cp", rank=2).export_lora(tempfile.mkdtemp())
        >>> lora_config(folder)["r"]
        2
    """
    folder = local_folder(folder, (CONFIG, WEIGHTS), revision, token, subfolder)
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"no {CONFIG} in {folder}; a LoRA of PEFT is a folder with {CONFIG} and {WEIGHTS}"
        )
    config = read_json(file)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise AdapterFileError(f"{file} describes no LoRA but {short(kind)}")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise AdapterFileError(f"the LoRA in {folder} has {key}: {why}, which no pair can say")
    try:
        _check(config)
    except ValueError as error:
        raise AdapterFileError(f"{file} cannot be read: {error}") from error
    return config


def _check(config: Mapping[str, Any]) -> None:
    bias, init = config.get("bias"), config.get("init_lora_weights")
    if bias not in (None, "none"):
        raise ValueError(f"it trains biases (bias={short(bias)})")
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"its start {short(init)} changes the base's weights. Convert it with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    rank = config.get("r", 8)
    if type(rank) is not int or rank < 1:
        raise ValueError(f"r is {short(rank)}")
    _number("lora_alpha", config.get("lora_alpha", 8))
    drop = config.get("lora_dropout")
    if drop is not None and not 0 <= _number("lora_dropout", drop) < 1:
        raise ValueError(f"lora_dropout is {short(drop)}")
    if config.get("use_rslora") not in (None, True, False):
        raise ValueError(f"use_rslora is {short(config['use_rslora'])}")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key)
        if not isinstance(patterns, dict | None) or len(patterns or ()) > _MOST_ENTRIES:
            raise ValueError(f"{key} is {short(patterns)}, no object of at most {_MOST_ENTRIES:,}")
        for name, value in (patterns or {}).items():
            _number(f"{key} of {short(name)}", value)
    Scaling(config)  # it refuses regular expressions
    names = config.get("modules_to_save")
    listed = [names] if isinstance(names, str) else names
    if names is not None and not (
        isinstance(listed, list)
        and len(listed) <= _MOST_ENTRIES
        and all(isinstance(name, str) and name for name in listed)
    ):
        raise ValueError(f"modules_to_save is {short(names)}")


def _number(what: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= 3.4e38:
        raise ValueError(f"{what} is {short(value)}, no finite number")
    return float(value)


class Scaling:
    """The factor by which PEFT multiplies the pair of each module: ``Scaling(config)(path, rank)``.

    Args:
        config: a configuration that `lora_config` returned.

    Example:
        >>> scaling = Scaling({"lora_alpha": 4, "alpha_pattern": {"v_proj": 6}})
        >>> scaling("layers.0.q_proj", 2), scaling("layers.0.v_proj", 2)
        (2.0, 3.0)
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._alpha = float(config.get("lora_alpha", 8))
        self._root = bool(config.get("use_rslora"))
        patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
        self._patterns = [(_Name(pattern), float(value)) for pattern, value in patterns.items()]

    def __call__(self, path: str, rank: int) -> float:
        """Compute the scaling of one module; as in PEFT, the first pattern that fits counts.

        Args:
            path: the path of the module.
            rank: the rank of its pair.
        """
        alpha = next((value for name, value in self._patterns if name.fits(path)), self._alpha)
        return alpha / (math.sqrt(rank) if self._root else rank)


class _Name:
    """A key of ``alpha_pattern``, which PEFT reads as a regular expression.

    A regular expression from an untrusted file can run for ever, so only plain names are accepted. A dot
    fits any character, as in PEFT.

    Raises:
        ValueError: other special characters of regular expressions.
    """

    def __init__(self, pattern: str) -> None:
        self._whole = pattern.startswith("^")
        found = re.findall(r"\\\.|.", pattern.removeprefix("^").removesuffix("$"), re.DOTALL)
        if not found or any(each in "\\^$*+?{}[]|()" for each in found):
            raise ValueError(
                f"alpha_pattern has the regular expression {short(pattern)}; only names of modules and "
                "ends of such names are read. Write one entry for each module"
            )
        self._letters = ["" if each == "." else each[-1] for each in found]

    def fits(self, path: str) -> bool:
        """Return True if the key is this module's path, or its end after a dot."""
        start = len(path) - len(self._letters)
        if start < 0 or (start and (self._whole or path[start - 1] != ".")):
            return False
        return all(letter in ("", own) for letter, own in zip(self._letters, path[start:]))


def saved_modules(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the modules that were trained as a whole.

    Args:
        config: a configuration that `lora_config` returned.
    """
    names = config.get("modules_to_save") or []
    return [names] if isinstance(names, str) else list(names)


def sealed_text(config: Mapping[str, Any]) -> str:
    """Write the fields on which the pairs depend as one text, for a digest.

    Args:
        config: the configuration of a LoRA.
    """
    return json.dumps({key: config.get(key) for key in _SEALED}, sort_keys=True)
