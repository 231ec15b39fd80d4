"""Models of transformers small enough to build in milliseconds, for the batches of `tests.small_model`."""

from typing import Any

from lightning_moevlm.model.backbones import HuggingFaceModel

TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}  # fmt: skip

OLMOE: dict[str, Any] = {"model_type": "olmoe"} | {
    name: size for name, size in TEXT.items() if name != "moe_intermediate_size"
}

_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}

QWEN: dict[str, Any] = {
    "model_type": "qwen3_vl_moe",
    "text_config": TEXT | {"rope_parameters": _ROPE},
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    },
}  # fmt: skip

LLAVA: dict[str, Any] = {
    "model_type": "llava",
    "text_config": OLMOE,
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    },
}  # fmt: skip

DEEPSEEK: dict[str, Any] = TEXT | {
    "model_type": "deepseek_v3", "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip


def small_hugging_face(config: dict[str, Any] = QWEN, **options: Any) -> HuggingFaceModel:
    """Width 32, 4 experts, 16 px images in 4 tokens, texts of 8 out of 300 tokens."""
    return HuggingFaceModel(config=config, image_size=16, vocab_size=300, max_text_len=8, **options)
