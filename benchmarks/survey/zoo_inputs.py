"""Inputs on which a tiny model of any transformers type runs; see `zoo` and `zoo_maker`.

What the maker cannot know of a type stands here as data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo_maker import TOKENS, WIDTH, Maker

#: Most layouts that are tried for one model.
_MOST_TRIALS = 24


def inputs(model: nn.Module, model_type: str) -> dict[str, Any]:
    """Arguments of a small forward, made for the model's config and the signature of its forward."""
    maker = Maker(model, model_type)
    given = EXTRA_INPUTS.get(model_type, {})
    if model_type in MAKERS:
        given = {**given, **MAKERS[model_type](maker)}
    first: dict[str, Any] | None = None
    for made in itertools.islice(maker.variants(given), _MOST_TRIALS):
        first = made if first is None else first
        try:
            with torch.no_grad():
                model(**made)
        except Exception:
            continue
        return made
    return first or {}


# By type


def _series(maker: Maker) -> dict[str, Any]:
    """Past and future of a series with its lags."""
    past = maker.config.context_length + max(maker.config.lags_sequence)
    future, features = maker.config.prediction_length, maker.config.num_time_features
    return {
        "past_values": maker.rand(1, past),
        "past_time_features": maker.rand(1, past, features),
        "past_observed_mask": torch.ones(1, past),
        "future_values": maker.rand(1, future),
        "future_time_features": maker.rand(1, future, features),
    }


def _masks(maker: Maker) -> dict[str, Any]:
    """What a mask decoder reads: an image, prompts."""
    width = maker.width()
    names = maker.signature
    made = {
        "image_embeddings": maker.rand(1, width, 4, 4),
        "image_positional_embeddings": maker.rand(1, width, 4, 4),
        "sparse_prompt_embeddings": maker.rand(1, 1, 2, width),
        "dense_prompt_embeddings": maker.rand(1, width, 4, 4),
        "multimask_output": False,
    }
    if "high_resolution_features" in names:
        made["high_resolution_features"] = [
            maker.rand(1, width // 8, 16, 16),
            maker.rand(1, width // 4, 8, 8),
        ]
    if "hq_token_only" in names:
        made["hq_token_only"] = False
        vit = maker.number("vit_dim", default=width)
        made["intermediate_embeddings"] = [maker.rand(1, 4, 4, vit)]
    return made


def _queries(maker: Maker) -> dict[str, Any]:
    """What a Q-Former reads: queries, features of an image."""
    width = maker.number("encoder_hidden_size", default=WIDTH)
    made = {"encoder_hidden_states": maker.rand(1, TOKENS, width)}
    if "query_embeds" in maker.signature:
        made["query_embeds"] = maker.rand(1, 4, maker.width())
    return made


def _cross(maker: Maker) -> dict[str, Any]:
    """What a decoder reads beside its own tokens."""
    width = maker.number("cross_attention_hidden_size", "encoder_hidden_size", default=0)
    return {"encoder_hidden_states": maker.rand(1, TOKENS, width or maker.width())}


def _geometry(maker: Maker) -> dict[str, Any]:
    width = maker.width()
    return {
        "box_embeddings": torch.rand(2, 1, 4, generator=maker.generator),
        "box_mask": torch.ones(1, 2, dtype=torch.bool),
        "box_labels": torch.ones(2, 1, dtype=torch.long),
        "img_feats": (maker.rand(1, width, 8, 8),),
        "img_pos_embeds": (maker.rand(1, width, 8, 8),),
    }


def _codebooks(name: str, axis: int, start: int = 0) -> Callable[[Maker], dict[str, Any]]:
    """Tokens of several codebooks."""

    def make(maker: Maker) -> dict[str, Any]:
        count = start + maker.number("num_codebooks", "num_channels", default=4)
        shape = {0: (count, TOKENS), 1: (1, count, TOKENS), 2: (1, TOKENS, count)}[axis]
        return {name: maker.ints(32, *shape)}

    return make


def _detr_encoder(maker: Maker) -> dict[str, Any]:
    width = maker.width()
    return {
        "vision_features": [maker.rand(1, width, 4, 4)],
        "text_features": maker.rand(1, TOKENS, width),
        "vision_pos_embeds": [maker.rand(1, width, 4, 4)],
        "spatial_sizes": [(4, 4)],
    }


def _detr_decoder(maker: Maker) -> dict[str, Any]:
    width = maker.width()
    return {
        "vision_features": maker.rand(1, 16, width),
        "text_features": maker.rand(1, TOKENS, width),
        "vision_pos_encoding": maker.rand(1, 16, width),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }


def _sam3_masks(maker: Maker) -> dict[str, Any]:
    width = maker.width()
    return {
        "decoder_queries": maker.rand(1, 4, width),
        "backbone_features": [maker.rand(1, width, side, side) for side in (16, 8, 4)],
        "encoder_hidden_states": maker.rand(1, 16, width),
        "prompt_features": maker.rand(1, TOKENS, width),
    }


def _segments(maker: Maker) -> dict[str, Any]:
    """Audio of the omni models: mels by frames, with the number of frames."""
    frames = 4 * maker.number("n_window", default=50)
    made = {
        "input_features": maker.rand(maker.mels(), frames),
        "feature_lens": torch.tensor([frames]),
    }
    if "aftercnn_lens" in maker.signature:
        made["aftercnn_lens"] = torch.tensor([frames // 2])
    return made


MAKERS: dict[str, Callable[[Maker], dict[str, Any]]] = {
    "autoformer": _series,
    "informer": _series,
    "time_series_transformer": _series,
    "sam2_mask_decoder": _masks,
    "sam_mask_decoder": _masks,
    "sam_hq_mask_decoder": _masks,
    "edgetam_mask_decoder": _masks,
    "edgetam_video_mask_decoder": _masks,
    "sam2_video_mask_decoder": _masks,
    "sam3_tracker_mask_decoder": _masks,
    "sam3_tracker_video_mask_decoder": _masks,
    "sam3_geometry_encoder": _geometry,
    "sam3_lite_text_geometry_encoder": _geometry,
    "sam3_detr_encoder": _detr_encoder,
    "sam3_lite_text_detr_encoder": _detr_encoder,
    "sam3_detr_decoder": _detr_decoder,
    "sam3_lite_text_detr_decoder": _detr_decoder,
    "sam3_mask_decoder": _sam3_masks,
    "sam3_lite_text_mask_decoder": _sam3_masks,
    "blip_2_qformer": _queries,
    "instructblip_qformer": _queries,
    "instructblipvideo_qformer": _queries,
    "trocr": _cross,
    "blip_text_model": _cross,
    "pix2struct_text_model": _cross,
    "canary_decoder": _cross,
    "pp_formulanet_text": _cross,
    "qwen2_5_omni_audio_encoder": _segments,
    "qwen3_omni_moe_audio_encoder": _segments,
    "dia": _codebooks("decoder_input_ids", 2),
    "csm": _codebooks("input_ids", 2),
    "kyutai_speech_to_text": _codebooks("input_ids", 2, 1),
    "musicgen": _codebooks("decoder_input_ids", 0),
    "musicgen_melody": _codebooks("decoder_input_ids", 0),
    "musicgen_decoder": _codebooks("input_ids", 0),
    "musicgen_melody_decoder": _codebooks("input_ids", 0),
}

#: Inputs by type: a value, None to leave it out, or a function of the maker.
EXTRA_INPUTS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {
        "input_values": lambda m: m.rand(1, m.config.max_length, m.config.num_mel_bins)
    },
    "clap": {"input_features": lambda m: m.rand(1, 1, 64, 64)},
    "clap_audio_model": {"input_features": lambda m: m.rand(1, 1, 64, 64)},
    "clvp": {"input_features": lambda m: m.rand(1, 80, 16)},
    "timesfm": {"freq": torch.zeros(1, 1, dtype=torch.long)},
    "patchtst": {
        "past_values": lambda m: m.rand(1, m.config.context_length, m.config.num_input_channels)
    },
    "bridgetower_vision_model": {"image": lambda m: m.images()},
    "speech-encoder-decoder": {"inputs": lambda m: m.rand(1, 2000)},
    "xmod": {"lang_ids": torch.zeros(1, dtype=torch.long)},
    "lxmert": {
        "visual_feats": lambda m: m.rand(1, 4, m.config.visual_feat_dim),
        "visual_pos": lambda m: m.rand(1, 4, m.config.visual_pos_dim),
    },
    "gemma3n_audio": {
        "audio_mel": lambda m: m.rand(1, 64, m.number("input_feat_size", default=128)),
        "audio_mel_mask": torch.zeros(1, 64, dtype=torch.bool),
    },
    "speecht5": {
        "input_values": lambda m: m.states(),
        "decoder_input_values": lambda m: m.states(),
    },
    "decision_transformer": {
        "states": lambda m: m.rand(1, 4, m.config.state_dim),
        "actions": lambda m: m.rand(1, 4, m.config.act_dim),
        "rewards": lambda m: m.rand(1, 4, 1),
        "returns_to_go": lambda m: m.rand(1, 4, 1),
        "timesteps": torch.arange(4).unsqueeze(0),
        "attention_mask": torch.ones(1, 4),
    },
    "idefics2_perceiver": {"attention_mask": lambda m: torch.ones(1, TOKENS)},
    "granite_speech_encoder": {"hidden_states": lambda m: m.rand(1, 64, m.config.input_dim)},
    "granite_speech_plus_encoder": {"hidden_states": lambda m: m.rand(1, 64, m.config.input_dim)},
    "granite_speech5_encoder": {"input_features": lambda m: m.rand(1, 64, 320)},
    "gemma4_audio": {"input_features": lambda m: m.rand(1, 64, 128)},
    "xclip_vision_model": {"pixel_values": lambda m: m.rand(m.config.num_frames, *m.image_shape())},
    "oneformer": {
        "pixel_values": lambda m: m.rand(1, 3, 64, 64),
        "task_inputs": lambda m: m.ints(32, 1, 77),
    },
    "molmo2_adapter": {
        "image_features": lambda m: m.rand(1, 16, m.config.hidden_size * 2),
        "pooled_patches_idx": torch.arange(16).reshape(1, 4, 4),
    },
    "mllama": {
        "pixel_values": lambda m: m.tiles(),
        "cross_attention_mask": lambda m: torch.ones(1, TOKENS, 1, 4, dtype=torch.long),
    },
    **{
        name: {
            "pixel_values": lambda m: m.rand(1, 3, 3, 32, 32),
            "image_sizes": torch.tensor([[32, 64]]),
        }
        for name in ("llava_next", "llava_next_video", "llava_onevision", "granite4_vision")
    },
    "muse_spark": {"pixel_values": lambda m: m.rand(16, 2 * m.patch_width())},
    "muse_glimmer": {"pixel_values": lambda m: m.rand(16, 2 * m.patch_width())},
    "phi4_multimodal_audio": {"hidden_states": lambda m: m.rand(1, 64, 80)},
    "hrm_text": {"use_cache": False},
    "recurrent_gemma": {"use_cache": False},
    "blt": {"use_cache": False},
    "idefics": {"image_attention_mask": torch.ones(1, TOKENS, 1, dtype=torch.long)},
    "instructblip": {"qformer_input_ids": lambda m: m.input_ids()},
    "instructblipvideo": {"qformer_input_ids": lambda m: m.input_ids()},
    "inkling2_vision": {
        "pixel_values": lambda m: m.rand(16 * m.vision("patch_size", default=8) ** 2, 3)
    },
    "molmo2_vision": {
        "pixel_values": lambda m: m.rand(1, m.number("num_position_embeddings", default=16), 192)
    },
    "muse_glimmer_vision": {"pixel_values": lambda m: m.rand(16, 2 * m.patch_width())},
    "muse_spark_vision": {"pixel_values": lambda m: m.rand(16, 2 * m.patch_width())},
    "muse_glimmer_assistant": {
        "context_hidden_states": lambda m: m.rand(
            1, TOKENS, WIDTH * len(m.find("target_layer_ids", default=[0]))
        )
    },
    "kosmos_2_5_vision_model": {"attention_mask": torch.ones(1, 16)},
    "dia_decoder": {
        "input_ids": lambda m: m.ints(32, 1, TOKENS, m.number("num_channels", default=9)),
        "encoder_hidden_states": lambda m: m.rand(
            1, TOKENS, m.number("cross_hidden_size", default=WIDTH)
        ),
    },
    "fun_asr_nano_encoder": {
        "input_features": lambda m: m.rand(1, 64, m.number("input_size", default=560))
    },
    "deepseek_ocr2_encoder": {"num_patches": TOKENS // 2},
    "dots3_note_audio_encoder": {"chunk_sample_lengths": torch.tensor([64])},
    "qwen3_asr_encoder": {
        "input_features": lambda m: m.rand(1, m.mels(), 2 * m.config.n_window),
        "input_features_mask": lambda m: torch.ones(1, 2 * m.config.n_window, dtype=torch.long),
    },
    **{
        name: {
            "input_values": lambda m: m.mono(),
            "input_features": lambda m: m.rand(1, 10, 160),
            "input_features_mask": None,
        }
        for name in ("xcodec2", "neucodec")
    },
    **{
        name: {"latents": lambda m: m.rand(1, m.width(), TOKENS)}
        for name in ("mimi_decoder", "pocket_tts_audio_tokenizer_decoder")
    },
    "sam2": {"pixel_values": lambda m: m.rand(2, 3, 64, 64)},
    "kosmos-2": {
        "input_ids": lambda m: m.ints(90, 1, TOKENS + m.config.latent_query_num),
        "image_embeds_position_mask": lambda m: torch.cat(
            [torch.ones(1, m.config.latent_query_num), torch.zeros(1, TOKENS)], 1
        ),
    },
    "pi0": {
        "pixel_values": lambda m: m.single(),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    },
    "jev": {
        "question_type_ids": torch.zeros(1, 2, dtype=torch.long),
        "marks": torch.tensor([[1, 3]]),
        "num_options": torch.tensor([[2, 2]]),
    },
    "granite_speech5_ctc": {
        "input_features": lambda m: m.rand(1, 64, m.number("input_dim", default=320))
    },
    "perceiver": {"inputs": lambda m: m.rand(1, TOKENS, m.config.d_model)},
    "florence_vision": {"hidden_states": lambda m: m.images()},
    "unlimited_ocr_vision_encoder": {"inputs_embeds": lambda m: m.images()},
    "voxtral_realtime_text": {"t_cond": lambda m: m.rand(1, 1, m.width())},
    "rag": {
        "context_input_ids": lambda m: m.ints(32, 5, TOKENS),
        "context_attention_mask": torch.ones(5, TOKENS, dtype=torch.long),
        "doc_scores": lambda m: m.rand(1, 5),
    },
    "blt_local_encoder": {
        "patch_embeds": lambda m: m.rand(1, 2, m.width()),
        "num_patches": 2,
        "patch_ids": torch.arange(2).repeat_interleave(TOKENS // 2).unsqueeze(0),
    },
    "qwen3_omni_moe_talker_code_predictor": {
        "input_ids": None,
        "inputs_embeds": lambda m: m.states(),
    },
}
