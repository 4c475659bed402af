"""Every model type that the installed transformers registers, built from its config alone.

No checkpoint is read. A type is built as its default config says (on the meta device, where it costs
nothing), or tiny: the default config shrunk by rules over the names of its fields, so that a forward
runs on a CPU in well under a second. What rules cannot know is data: `zoo_configs`.

    from zoo import build, inputs
    model = build("qwen3", "tiny", "cpu")
    model(**inputs(model, "qwen3"))
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo_configs import (
    AXES,
    CONFIGS,
    HEAD_DIM,
    HEADS,
    INNER,
    KV_HEADS,
    TINY,
    VOCAB,
    WIDTH,
)
from zoo_inputs import inputs

transformers.utils.logging.set_verbosity_error()

__all__ = ["CannotBuildError", "build", "config", "inputs", "model_types", "parameters"]

#: Sizes of `build`. "tiny" shrinks all; "slim" keeps widths and shrinks counts (layers, experts,
#: vocabulary), for types whose widths are tied to each other in ways that rules cannot see.
SIZES = ("default", "tiny", "slim")


class CannotBuildError(ValueError):
    """A type that cannot be built here; the message says why."""


def model_types() -> list[str]:
    """Every registered model type, in the order of the registry."""
    return list(CONFIG_MAPPING.keys())


def build(model_type: str, size: str = "default", device: str = "meta") -> nn.Module:
    """A model of a type, in evaluation mode.

    On the CPU its weights are drawn at random from a fixed seed, all of them, so that no gate that
    starts at zero hides the rest of the model.

    Args:
        model_type: one of `model_types`.
        size: one of ``SIZES``.
        device: ``"meta"`` or ``"cpu"``.

    Raises:
        CannotBuildError: a library is missing, or the config does not work.
    """
    try:
        if size != "default" and model_type not in _CLASSES:
            build(model_type)
        made = config(model_type, size)
        torch.manual_seed(0)
        with warnings.catch_warnings(), torch.device(device):
            warnings.simplefilter("ignore")
            model = _construct(model_type, made)
    except CannotBuildError:
        raise
    except Exception as error:
        raise CannotBuildError(_reason(error)) from error
    if device != "meta":
        _randomise(model)
    return model.eval()


def parameters(model: nn.Module) -> int:
    """How many numbers the model's parameters hold."""
    return sum(p.numel() for p in model.parameters())


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    missing = re.search(r"requires the (\S+) library", text)
    if isinstance(error, ImportError) and missing:
        return f"needs {missing[1]}"
    return f"{type(error).__name__}: {text[:160]}"


# Configs


def config(model_type: str, size: str = "default") -> PreTrainedConfig:
    """The config of a type in one of the ``SIZES``."""
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}; found {size!r}")
    overrides = CONFIGS.get(model_type, {})
    default = _config(model_type, {k: v for k, v in overrides.items() if k != "_tiny"})
    if size == "default":
        return default
    return _Shrinker(default, widths=size == "tiny").shrink(default, TINY.get(model_type, {}))


def _config(model_type: str, options: Mapping[str, Any]) -> PreTrainedConfig:
    given = {name: _sub_config(value) for name, value in options.items()}
    return CONFIG_MAPPING[model_type](**given)


def _sub_config(value: Any) -> Any:
    """``{"model_type": ...}`` as a config; other values as they are."""
    if isinstance(value, Mapping) and "model_type" in value:
        return _config(value["model_type"], {k: v for k, v in value.items() if k != "model_type"})
    return value


# The class of a type

_PREFERRED = (
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)


def candidates(model_type: str, made: PreTrainedConfig) -> Iterator[type[nn.Module]]:
    """Model classes for a config: those of the auto classes, then those of its modeling module."""
    others = sorted(name for name in vars(modeling_auto) if name.endswith("_MAPPING_NAMES"))
    for mapping in dict.fromkeys((*_PREFERRED, *others)):
        names = vars(modeling_auto).get(mapping, {}).get(model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            found = getattr(transformers, name, None)
            if isinstance(found, type) and issubclass(found, nn.Module):
                yield found
    module = type(made).__module__.replace(".configuration_", ".modeling_")
    try:
        members = vars(importlib.import_module(module)).values()
    except ModuleNotFoundError:
        return
    own = [
        member
        for member in members
        if isinstance(member, type)
        and issubclass(member, PreTrainedModel)
        and member.__module__ == module
        and getattr(member, "config_class", None) is type(made)
        and "forward" in vars(member)
    ]
    # the model of the type itself before the heads for tasks on top of it
    yield from sorted(own, key=lambda member: ("For" in member.__name__, -len(member.__name__)))
    stem = type(made).__name__.removesuffix("Config")  # parts of models, which are plain modules
    named = (vars(sys.modules[module]).get(f"{stem}{end}") for end in ("", "Model", "Transformer"))
    yield from (cls for cls in named if isinstance(cls, type) and issubclass(cls, nn.Module))


#: The class that was built of each type: small ones are of the same class as the default.
_CLASSES: dict[str, type[nn.Module]] = {}


def _construct(model_type: str, made: PreTrainedConfig) -> nn.Module:
    first: Exception | None = None
    known = _CLASSES.get(model_type)
    for cls in [known] if known else dict.fromkeys(candidates(model_type, made)):
        try:
            model = cls(copy.deepcopy(made))
        except Exception as error:
            first = first or error
        else:
            _CLASSES[model_type] = cls
            return model
    if first is not None:
        raise first
    return AutoModel.from_config(made)  # raises, with the names of what there is


def _randomise(model: nn.Module) -> None:
    """Draw every parameter anew: matrices by their fan-in, vectors near where they start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() < 2:
                start = torch.nan_to_num(parameter.clamp(-8, 8))
                parameter.copy_(torch.where(start.abs() < 0.02, 0, start) + 0.1 * noise)
            else:
                parameter.copy_(noise / math.sqrt(max(1, parameter[0].numel())))


# Tiny configs

_LAYERS = re.compile(
    r"(num_(hidden_|encoder_|decoder_|conv_|adapter_)?layers|n_layers?|(\w+_)?layers|\w+num_hidden_layers"
    r"|num_(hidden|decoder)_blocks|num_blocks|\w*depth|[lrx]_layers|\w+_num_layers)"
)
_NOT_LAYERS = re.compile(
    r"\w*(every|shared|dense|step|interval|window|iou|max_|min_|divis|stack)\w*"
)
_QUERY_HEADS = re.compile(r"\w*(num_heads|attention_heads|n_heads?|nhead|num_heads|_heads|heads)")
_KV_COUNT = re.compile(r"\w*(key_value_heads|kv_heads)")
_HEAD_DIMS = re.compile(
    r"\w*(head_dim|d_kv|d_head|dim_head|head_size|key_value_proj_dim|kv_channels)"
)
_INNER = re.compile(
    r"\w*(intermediate|ffn|mlp_dim|d_ff|dff|dim_ff|feedforward_dim|n_inner|d_inner)\w*"
)
_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts|moe_num_experts")
_TOP_K = re.compile(
    r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|num_selected_experts|top_k_experts"
)
_VOCAB = re.compile(r"\w*vocab_size\w*|vocab_size")
_WIDTHS = re.compile(
    r"\w*(hidden_size|hidden_dim|hidden_dims|d_model|embed_dim|embedding_size|projection_dim|n_embd|emb_dim"
    r"|embedding_dim|embed_size|latent_dim|out_hidden_size|output_dim|project_dim|projection_size"
    r"|model_dim|hidden_channels|output_hidden_size|pooler_output_size|text_hidden_size|d_embed"
    r"|lru_width|attention_hidden_size|query_dim|decoder_dim|output_proj_dims|adapter_in_dim"
    r"|adapter_out_dim|adapter_input_size|vision_output_dim|projector_\w+_dim|hidden_size_\w+)|dim"
)
_TOKEN = re.compile(r"\w+_(token_id|token_index|_id|token_ids|start_id|end_id|newline_id|index|id)")

#: Fields that are set to this number where they are larger.
_AT_MOST = {
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256,
    "max_source_positions": 32, "max_target_positions": 64, "sliding_window": 8,
    "num_queries": 10, "two_stage_num_proposals": 10, "num_denoising": 0,
    "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "n_group": 1, "topk_group": 1, "index_topk": 4, "index_n_heads": 4, "index_head_dim": 16,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "encoder_hash_byte_group_vocab": 64,
    "num_position_embeddings": 256, "entity_vocab_size": 50, "entity_emb_size": 64, "num_hash_buckets": 64,
    "num_query_tokens": 4, "resampler_n_latents": 4, "resampler_num_latents": 4, "num_latents": 8,
    "d_latents": 64, "rotary_dim": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "ssm_state_size": 8,
    "state_size": 8, "chunk_size": 8, "num_frames": 2, "first_k_dense_replace": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "query_pre_attn_scalar": 16,
    "hidden_size_per_layer_input": 16, "laurel_rank": 8, "crop_size": 32, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16, "block_size": 4, "attention_window": 4,
    "upsample_groups": 64, "base_channels": 32, "mm_tokens_per_image": 4, "local_attention": 8,
    "num_register_tokens": 2, "max_window_layers": 1,
}  # fmt: skip


class _Shrinker:
    """Shrinks one tree of configs; equal numbers stay equal all over the tree."""

    def __init__(self, root: PreTrainedConfig, widths: bool) -> None:
        self.widths = widths
        self.tokens: dict[int, int] = {}

    def shrink(self, whole: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
        """A new config of the same class."""
        fields = _fields(whole)
        layers = _kept_layers(fields)
        new: dict[str, Any] = {}
        for name, value in fields.items():
            if isinstance(value, PreTrainedConfig):
                new[name] = self.shrink(value, _below(overrides, name))
            elif isinstance(value, bool) or value is None:
                continue
            elif isinstance(value, int):
                small = self.number(name, value, fields, len(layers) if layers else None)
                if small != value:
                    new[name] = small
            elif isinstance(value, (list, tuple)) and value:
                small = self.sequence(name, value, fields, layers)
                if small != value:
                    new[name] = small
        outputs = fields.get("_out_features")
        if outputs:  # what it has no argument for under this name
            count = len(layers) if layers else 0
            cut = 0 < count < (_layer_count(fields) or 0)
            last = [f"stage{k}" for k in range(count - len(outputs) + 1, count + 1)]
            new["out_features"] = last if cut else list(outputs)
        new = {name: value for name, value in new.items() if _wanted(name, value)}
        new |= {name: value for name, value in overrides.items() if "." not in name}
        kept = {name: value for name, value in fields.items() if _wanted(name, value)}
        self.rope(whole.model_type, kept, new, fields)
        return type(whole)(**{**kept, **new})

    def number(self, name: str, value: int, fields: Mapping[str, Any], layers: int | None) -> int:
        """An integer field made small."""
        if value < 2 and name not in _AT_MOST:
            return value
        if _TOKEN.fullmatch(name):
            return self.token(value)
        if _VOCAB.fullmatch(name) and "type" not in name:
            return min(value, VOCAB)
        if name in ("num_hidden_layers", "n_layer", "num_layers") and layers:
            return layers
        if _LAYERS.fullmatch(name) and not _NOT_LAYERS.fullmatch(name):
            return min(value, 2)
        if _EXPERTS.fullmatch(name):
            return min(value, 4)
        if _TOP_K.fullmatch(name):
            return min(value, 2)
        if not self.widths:
            return value
        if name in _AT_MOST:
            return min(value, _AT_MOST[name])
        return self.width(name, value, fields)

    def width(self, name: str, value: int, fields: Mapping[str, Any]) -> int:
        """An integer field that is a width, a head count or a size of the input."""
        if _KV_COUNT.fullmatch(name):
            heads = fields.get("num_attention_heads", fields.get("n_head", value))
            return HEADS if value == heads else min(value, KV_HEADS)
        if _QUERY_HEADS.fullmatch(name):
            return min(value, HEADS)
        if _HEAD_DIMS.fullmatch(name):
            return min(value, HEAD_DIM if self.fills(name, value, fields) else HEAD_DIM // 2)
        if _INNER.fullmatch(name):
            return min(value, INNER)
        if _WIDTHS.fullmatch(name):
            return min(value, WIDTH)
        if name == "patch_size":
            return min(value, 8)
        if name in ("image_size", "input_size", "pretrain_image_size", "img_size"):
            return self.image(value, fields)
        return value

    @staticmethod
    def fills(name: str, value: int, fields: Mapping[str, Any]) -> bool:
        """Whether the heads side by side are as wide as the residual stream."""
        hidden = fields.get("hidden_size") or fields.get("d_model") or 0
        heads = fields.get("num_attention_heads") or fields.get("num_heads") or 1
        return (
            not isinstance(heads, int)
            or not isinstance(hidden, int)
            or hidden in (0, heads * value)
        )

    @staticmethod
    def image(value: int, fields: Mapping[str, Any]) -> int:
        """Four patches of 8 a side, or 64 pixels where patches are fine and stages follow."""
        patch = fields.get("patch_size", 4)
        return min(value, 32 if isinstance(patch, int) and patch > 4 else 64)

    def token(self, value: int) -> int:
        """A special token inside the small vocabulary; equal tokens stay equal."""
        if value < 100:
            return value
        return self.tokens.setdefault(value, 100 + len(self.tokens) % (VOCAB - 100))

    def sequence(
        self, name: str, value: Any, fields: Mapping[str, Any], layers: list[int] | None
    ) -> Any:
        """A list: cut to the kept layers, or its entries made small."""
        kind = type(value)
        if layers and len(value) == _layer_count(fields):
            return kind(value[k] for k in layers)
        if _TOKEN.fullmatch(name) and all(isinstance(entry, int) for entry in value):
            return kind(self.token(entry) for entry in value)
        if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value):
            return value
        if name in ("depths", "num_block_repeats", "stage_num_blocks", "layers"):
            return kind(min(entry, 2) for entry in value)
        if "image_size" in name and self.widths:
            return kind(self.image(entry, fields) for entry in value)
        if name == "decoder_in_channels" and self.widths:
            return kind(min(entry, WIDTH) for entry in value)
        if name == "conv_dim" and self.widths:
            return kind(min(entry, 32) for entry in value)
        if layers and re.search(r"ind(ex|ic)|hook|extract|intermediate_layers", name):
            return kind(sorted({min(abs(entry), len(layers) - 1) for entry in value}))
        return value

    def rope(
        self,
        model_type: str,
        kept: dict[str, Any],
        new: dict[str, Any],
        fields: Mapping[str, Any],
    ) -> None:
        """Sections of multi-axis rotary embeddings follow the head size."""
        old = _head_dim(fields)
        head_dim = _head_dim({**kept, **new})
        for name in ("rope_parameters", "rope_scaling"):
            found = fields.get(name)
            if not isinstance(found, dict) or name in new or not old or not head_dim:
                continue
            axes = AXES.get(model_type)
            scale = head_dim / old
            if axes:
                half = head_dim * found.get("partial_rotary_factor", 1) / 2
                found = {"mrope_section": list(axes), **found}
                scale = half / sum(found["mrope_section"])
            new[name] = _scaled_sections(found, scale)


def _scaled_sections(rope: dict[str, Any], scale: float) -> dict[str, Any]:
    scaled = dict(rope)
    for name, value in rope.items():
        if isinstance(value, dict):
            scaled[name] = _scaled_sections(value, scale)
        elif name == "mrope_section":
            total = round(sum(value) * scale)
            parts = [int(entry * scale) for entry in value]
            for k in range(total - sum(parts)):
                parts[k % len(parts)] += 1
            scaled[name] = parts
        elif name in ("short_factor", "long_factor"):
            scaled[name] = value[: max(1, round(len(value) * scale))]
    return scaled


def _head_dim(fields: Mapping[str, Any]) -> int:
    head_dim = fields.get("head_dim")
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if isinstance(head_dim, int):
        return head_dim
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else 0


#: Fields that models read and configs do not declare; `CONFIGS` gives them.
_UNDECLARED = (
    "dropout_rate", "shared_expert_intermediate_size", "initializer_range", "num_key_value_heads",
    "head_config", "rope_theta", "spatial_merge_size",
)  # fmt: skip


def _fields(whole: PreTrainedConfig) -> dict[str, Any]:
    """What the constructor of a config takes, with the values that this one has."""
    names = [*inspect.signature(type(whole)).parameters, *_UNDECLARED]
    names = [name for name in names if name in vars(whole)]
    return {name: vars(whole)[name] for name in names}


def _wanted(name: str, value: Any) -> bool:
    """Whether a field is passed on: derived ones are left for the constructor."""
    return name not in (
        "id2label",
        "label2id",
        "dtype",
        "architectures",
        "transformers_version",
        "_out_features",
        "_out_indices",
        "kwargs",
    )


def _below(overrides: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {
        key.removeprefix(f"{name}."): value
        for key, value in overrides.items()
        if key.startswith(f"{name}.")
    }


def _layer_count(fields: Mapping[str, Any]) -> int | None:
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"):
        if isinstance(fields.get(name), int):
            return int(fields[name])
    types = fields.get("layer_types")
    return len(types) if isinstance(types, (list, tuple)) else None


def _kept_layers(fields: Mapping[str, Any]) -> list[int] | None:
    """Two layers, or as many as there are kinds of layers."""
    count = _layer_count(fields)
    if not count:
        return None
    lists = [
        value
        for value in fields.values()
        if isinstance(value, (list, tuple)) and len(value) == count > 2
    ]
    kinds: dict[str, int] = {}
    for k in range(count):
        kinds.setdefault(repr([entries[k] for entries in lists if isinstance(entries[k], str)]), k)
    kept = sorted(kinds.values())[:6]
    for k in range(count):
        if len(kept) < _outputs(fields) and k not in kept:
            kept.append(k)
    return sorted(kept)


def _outputs(fields: Mapping[str, Any]) -> int:
    """As many layers as there are outputs of layers, two at least."""
    lists = (fields.get(name) for name in ("out_indices", "_out_indices", "_out_features"))
    return max(2, *(len(found) if isinstance(found, (list, tuple)) else 0 for found in lists), 0)
