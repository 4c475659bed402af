"""What default configs lack, and what the rules that shrink them get wrong: data for `zoo`."""

from __future__ import annotations

from typing import Any

#: Sizes of tiny models.
WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 96, 4, 2, 16, 160

_BERT: dict[str, Any] = {"model_type": "bert"}
_T5: dict[str, Any] = {"model_type": "t5"}

_RESNET: dict[str, Any] = {
    "backbone_config": {
        "model_type": "resnet",
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
}
_ROPES = {
    kind: {"rope_type": "default", "rope_theta": 10000.0}
    for kind in ("full_attention", "sliding_attention")
}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
_HUNYUAN = {
    "head_dim": 128,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [16, 16, 16, 16],
    },
}
_ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}

#: What default configs lack: sub-configs that must be given, values without which nothing is built.
CONFIGS: dict[str, dict[str, Any]] = {
    "encoder-decoder": {
        "encoder": _BERT,
        "decoder": {**_BERT, "is_decoder": True, "add_cross_attention": True},
    },
    "vision-encoder-decoder": {
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "gpt2", "add_cross_attention": True},
    },
    "speech-encoder-decoder": {
        "encoder": {"model_type": "wav2vec2"},
        "decoder": {**_BERT, "is_decoder": True, "add_cross_attention": True},
    },
    "vision-text-dual-encoder": {"vision_config": {"model_type": "vit"}, "text_config": _BERT},
    "rag": {"question_encoder": {"model_type": "dpr"}, "generator": {"model_type": "bart"}},
    "musicgen": {
        "text_encoder": _T5,
        "audio_encoder": {"model_type": "encodec"},
        "decoder": {"model_type": "musicgen_decoder"},
    },
    "musicgen_melody": {
        "text_encoder": _T5,
        "audio_encoder": {"model_type": "encodec"},
        "decoder": {"model_type": "musicgen_melody_decoder"},
    },
    "autoformer": {"prediction_length": 8, "context_length": 16, "label_length": 8},
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "deepseek_ocr2_text": {
        "num_experts_per_tok": 6,
        "mlp_layer_types": ["dense", *["sparse"] * 31],
    },
    "deepseek_ocr2": {
        "text_config": {
            "model_type": "deepseek_ocr2_text",
            "num_experts_per_tok": 6,
            "mlp_layer_types": ["dense", *["sparse"] * 31],
        }
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": _HUNYUAN,
    "hunyuan_vl": {"text_config": {"model_type": "hunyuan_vl_text", **_HUNYUAN}},
    "ministral": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "nemotron": {"num_key_value_heads": 8},
    "dots1": {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "chameleon": {"vocabulary_map": {"<image>": 8711, "IMGIMGBS": 8712}},
    "emu3": {"vocabulary_map": {"<image>": 151646, "<|visual token 000000|>": 151647}},
    "aya_vision": {
        "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}
    },
    "diffusion_gemma_text": {
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 704,
    },
    "diffusion_gemma": {
        "text_config": {
            "model_type": "diffusion_gemma_text",
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 704,
        }
    },
    **dict.fromkeys(
        ("detr", "conditional_detr", "dab-detr", "table-transformer", "deformable_detr"), _RESNET
    ),
    "cohere_compass_text": {"rope_parameters": _ROPES},
    "cohere_compass": {
        "text_config": {"model_type": "cohere_compass_text", "rope_parameters": _ROPES}
    },
    "granite4_vision": {"deepstack_layer_map": [[-1, 0], [-2, 1]], "downsample_rate": "4/8"},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": {"model_type": "qwen4_exp_text", **_INDEXER}},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"text_config": {"model_type": "t5gemma2_text", "dropout_rate": 0.0}},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 2048},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_ASSISTANT}},
    "gemma4_unified_assistant": {
        "text_config": {"model_type": "gemma4_unified_text", **_ASSISTANT}
    },
    "vitmatte": {
        "backbone_config": {"model_type": "vitdet", "out_features": ["stage12"]},
        "convstream_hidden_sizes": [48, 96, 192],
        "fusion_hidden_sizes": [256, 128, 64, 32],
    },
    "dbrx": {
        "d_model": 6144,
        "n_heads": 48,
        "attn_config": {"kv_n_heads": 8, "rope_theta": 500000.0, "clip_qkv": 8.0},
    },
    "pix2struct_text_model": {"initializer_range": 0.02},
    "qwen3_omni_moe": {
        "talker_config": {
            "spatial_merge_size": 2,
            "text_config": {"shared_expert_intermediate_size": 2048},
        }
    },
    "blip-2": {"image_token_index": 95},
    "instructblip": {"image_token_index": 95},
    "instructblipvideo": {"video_token_index": 95},
    "step3p5": {"sliding_window": 512},
    "step3p7": {"text_config": {"model_type": "step3p5", "sliding_window": 512}},
}

#: Sections of the rotary embedding's axes that stand in the code and not in the default config.
AXES = {
    "glm4v_text": (8, 12, 12), "glm4v_moe_text": (8, 12, 12), "glm_ocr_text": (8, 12, 12),
    "glm_image_text": (8, 12, 12), "paddleocr_vl_text": (16, 24, 24), "qwen2_vl_text": (16, 24, 24),
    "qwen2_5_vl_text": (16, 24, 24), "qwen2_5_omni_text": (16, 24, 24),
    "qwen2_5_omni_talker": (16, 24, 24), "ernie4_5_vl_moe_text": (22, 22, 20),
}  # fmt: skip

_PYRAMID = {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": WIDTH}

#: What the rules get wrong, by type; a dot leads into a sub-config.
TINY: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "xlnet": {"d_head": 16},
    "sam": {"vision_config.output_channels": WIDTH, "vision_config.num_pos_feats": WIDTH // 2},
    "sam_hq": {
        "vision_config.output_channels": WIDTH,
        "vision_config.num_pos_feats": WIDTH // 2,
        "mask_decoder_config.vit_dim": WIDTH,
    },
    "sam2_hiera_det_model": {"hidden_size": 96},
    "sam2_vision_model": {"backbone_config.hidden_size": 96, **_PYRAMID},
    "sam2": {
        "vision_config.backbone_config.hidden_size": 96,
        **{f"vision_config.{name}": value for name, value in _PYRAMID.items()},
    },
    "align": {"projection_dim": 640},
    "clap_audio_model": {"hidden_size": 128},
    "clap": {"audio_config.hidden_size": 128},
    "glm5_next": {"text_config.index_kpool": 4},
    "glm5_next_text": {"index_kpool": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [INNER] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "llama4_vision_model": {"intermediate_size": 256},
    "llama4": {"vision_config.intermediate_size": 256},
    "mllama": {"vision_config.vision_output_dim": 2 * WIDTH},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "sam3_lite_text_text_model": {"num_hidden_layers": 4},
    "longcat_flash": {"qk_head_dim": 24, "head_dim": 8},
    "mistral4": {"qk_nope_head_dim": 8},
    "mask2former": {"backbone_config.embed_dim": 48},
    "oneformer": {"backbone_config.embed_dim": 48},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "nemotron_h": {"n_groups": 2},
    "nemo_speechlm": {"text_config.n_groups": 2},
    "nemotron_h_omni": {"text_config.n_groups": 2},
    "audio-spectrogram-transformer": {"max_length": 64},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    **{
        name: {"image_grid_pinpoints": [[32, 64]]}
        for name in ("llava_next", "llava_next_video", "llava_onevision", "granite4_vision")
    },
    "tvp": {"max_img_size": 64, "visual_prompt_size": 16},
    "zamba": {
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * WIDTH // HEADS,
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
    },
    "t5gemma2": {"encoder.mm_tokens_per_image": 4},
    "phi4_multimodal_audio": {"nemo_conv_channels": 64, "input_size": 80},
    "phi4_multimodal": {"audio_config.nemo_conv_channels": 64},
    "seggpt": {
        "num_hidden_layers": 5,
        "merge_index": 0,
        "intermediate_hidden_state_indices": [1, 2, 3, 4],
    },
}
