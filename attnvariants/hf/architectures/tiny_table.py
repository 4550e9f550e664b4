"""What the fields of transformers' configs become in a tiny model: rules by name, and exceptions.

A rule or exception is a value or a function of `tiny.Sizes`; the first rule that is found in a
field's name applies, and never makes a number larger.
"""

from __future__ import annotations

from typing import Any


def _hidden(sizes: Any) -> int:
    return sizes.hidden


def _inner(sizes: Any) -> int:
    return sizes.inner


def _heads(sizes: Any) -> int:
    return sizes.heads


def _layers(sizes: Any) -> int:
    return sizes.layers


HEADS = r"(attention_heads|num_heads|n_heads?|num_attn_heads)(_per_layer|_per_stage)?$"

RULES: list[tuple[str, Any]] = [
    # experts
    (r"^(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|num_experts_per_topk|top_k)", 2),
    (r"^topk_group$", 1),
    (r"^(n_group|num_expert_group)$", 2),
    (r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts)$", 4),
    (r"(shared_experts?|num_shared)$", 1),
    # attention
    (r"(num_key_value_heads|num_kv_heads|num_query_groups|key_value_heads)", lambda s: s.kv_heads),
    (r"^qk_rope_head_dim$", lambda s: s.head_dim // 2),
    (r"^qk_head_dim$", lambda s: s.head_dim * 3 // 2),
    (r"^(rotary_dim)$", lambda s: s.head_dim // 2),
    (r"lora_rank", 24),
    (r"^index_n_heads$", 2),
    (r"^index_topk$", 4),
    (r"(head_dim|d_kv|kv_channels|attention_head_size|dim_head|d_head)", lambda s: s.head_dim),
    (HEADS, _heads),
    (
        r"^(sliding_window|sliding_window_size|attention_chunk_size|attention_window_size"
        r"|local_attention|local_attention_window_len|keep_window_size)$",
        lambda s: s.window,
    ),
    # layers
    (
        r"^(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|layers|depth)$",
        _layers,
    ),
    (r"(hidden_layers|encoder_layers|decoder_layers|num_layers|_layers)$", _layers),
    (r"^depths$", 1),
    # widths
    (
        r"(intermediate_size|ffn_dim|d_ff|dff|n_inner|d_inner|feedforward|mlp_dim|linear_units"
        r"|ffn_hidden_size|dim_ff|intermediate_dim)",
        _inner,
    ),
    (
        r"^(hidden_size|d_model|n_embd|dim|emb_dim|embed_dim|embedding_size|word_embed_proj_dim"
        r"|hidden_dim|true_hidden_size|lru_width|projection_dim|proj_dim)$",
        _hidden,
    ),
    (
        r"(hidden_size|hidden_dim|output_dim|output_proj_dims|projection_size|project_dim"
        r"|embed_dim|mm_embed_dim|emb_size)$",
        _hidden,
    ),
    (r"^(hidden_sizes|embed_dims|neck_hidden_sizes|encoder_hidden_sizes)$", _hidden),
    # tokens and positions
    (r"vocab_size", lambda s: s.vocab),
    (
        r"(max_position_embeddings|n_positions|max_source_positions|max_target_positions|n_ctx"
        r"|max_seq_len|max_pos_emb|model_max_length|position_embeddings)$",
        lambda s: s.positions,
    ),
    (r"^n_groups$", 2),
    # images
    (r"^window_size$", 2),
    (r"^(image_size|img_size|input_size|pretrain_image_size)$", lambda s: s.image),
    (r"^patch_size$", lambda s: s.patch),
    (r"^num_mel_bins$", 16),
]

SEEDS: dict[str, dict[str, Any]] = {}

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_ssm": 128}
_GLOBAL_HEADS = {"global_head_dim": lambda s: 2 * s.head_dim}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {name: value for name, value in _MAMBA2.items() if name != "mamba_d_ssm"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": lambda s: s.window},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "glm5_next_text": {"index_kpool": 2},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
        "num_key_value_heads": _heads,
    },
    "longcat_flash": {"head_dim": lambda s: s.head_dim // 2},
    "unlimited_ocr_text": {"num_key_value_heads": _heads},
    "diffusion_gemma_text": {
        **_GLOBAL_HEADS,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": _inner,
    },
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 1e4}},
    **{
        # windows of two by two merged patches
        name: {"window_size": lambda s: 4 * s.patch}
        for name in ("qwen2_5_vl_vision", "qwen2_5_omni_vision_encoder", "exaone4_5_vision")
    },
    **{
        name: {"prediction_length": 8, "context_length": 24}
        for name in ("autoformer", "informer", "time_series_transformer")
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "step3p7_text": {"sliding_window": lambda s: s.window},
    "step3p5": {"sliding_window": lambda s: s.window},
    **{
        # four stages, each half as wide as the one before, and windows of two patches, which every
        # second layer shifts
        name: {"image_size": 64, "patch_size": 4, "depths": [2, 1, 1, 1]}
        for name in ("swin", "donut-swin", "maskformer-swin", "swinv2")
    },
    # the tiny sections of its rope sum to half a head
    "hy_v4_vl_text": {"qk_rope_head_dim": lambda s: s.head_dim},
    **{name: {"codebook_dim": _hidden} for name in ("wavtokenizer", "wavtokenizer_encoder")},
    # as many layers as its cycles go through, for which its cache is made
    "hrm_text": {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1, "num_hidden_layers": 2},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "num_key_value_heads": _heads,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "seamless_m4t": {"t2u_pad_token_id": 1, "pad_token_id": 0},
    "seamless_m4t_v2": {"t2u_pad_token_id": 1, "pad_token_id": 0},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"num_key_value_heads": _heads},
    "embedding_gemma2_text": _GLOBAL_HEADS,
    "gemma4_text": _GLOBAL_HEADS,
    "gemma4_unified_text": _GLOBAL_HEADS,
    "falcon_h1": _MAMBA2,
    "granitemoehybrid": {
        **{name: value for name, value in _MAMBA2.items() if name != "mamba_d_ssm"},
        "layer_types": ["linear_attention", "full_attention"],
    },
    "granite_speech_encoder": {"context_size": 16},
    "granite_speech_plus_encoder": {"context_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    # its rope parameters hold the share of the default sizes, a half
    "mistral4": {"qk_rope_head_dim": lambda s: s.head_dim, "head_dim": lambda s: 2 * s.head_dim},
    "moonshine": {"encoder_num_key_value_heads": _heads, "decoder_num_key_value_heads": _heads},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {
        "attention_hidden_size": lambda s: 2 * s.hidden,
        "attention_head_dim": lambda s: 2 * s.hidden // s.heads,
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention"] + ["hybrid"] * 4,
    },
}
