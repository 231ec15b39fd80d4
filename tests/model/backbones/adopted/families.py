"""Every family of the installed transformers that has experts, as a tiny random language model.

One table of small sizes serves all of them: a configuration takes the names that it has. What a family needs beside is
an entry of NEEDS.
"""

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "d_model": 32, "num_hidden_layers": 2, "num_layers": 2, "n_layers": 2,
    "num_decoder_layers": 2, "num_attention_heads": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 4,
    "head_dim": 8, "intermediate_size": 32, "ffn_dim": 32, "d_ff": 32, "d_kv": 8, "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16, "ffn_hidden_size": 32, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "expert_intermediate_size": 16,
    "intermediate_size_mlp": 32, "mlp_hidden_size": 32, "dense_intermediate_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_top_k": 2, "moe_topk": 2, "top_k_experts": 2, "num_experts_per_token": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "qk_head_dim": 12, "v_head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_sparse_step": 1,
}  # fmt: skip

_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

NEEDS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _MIXED,
    "beam": {"mlp_layer_types": ["sparse", "sparse"]},
    "dbrx": {"attn_config": {"kv_n_heads": 4, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 16}},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 8],
        "mlp_layer_types": ["sparse", "sparse"],
        "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": []},
    "gemma4": {"enable_moe_block": True, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 4},
    "glm4v_moe": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    "glm5_next": {
        "qk_rope_head_dim": 0,
        "mlp_layer_types": ["dense", "sparse"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "index_head_dim": 8,
        "index_n_heads": 4,
    },
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_state": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "kimi_linear": _MIXED | {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 1, "head_dim": 4},
    "mimo_v2_flash": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen3_5_moe": _MIXED,
    "qwen3_next": _MIXED,
    "qwen4_exp": _MIXED
    | {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "step3p7": {"mlp_layer_types": ["sparse", "sparse"], "sliding_window": 8},
    "switch_transformers": {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "num_sparse_encoder_layers": 2},
    "vitpose_backbone": {"part_features": 8, "num_experts": 2, "image_size": [32, 32]},
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """Return the families whose modeling file calls experts."""
    files = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    return sorted({file.parent.name for file in files if "self.experts(" in file.read_text("utf-8")})


def tiny(family: str) -> PreTrainedModel:
    """Return its language model with random weights, in evaluation."""
    config_class, model_class = _classes(family)
    config = config_class(**small_options(config_class) | NEEDS.get(family, {}))
    model = model_class._from_config(config).eval()
    fill_tables(model)
    return model


def fill_tables(model: nn.Module) -> None:
    """Give each token id experts of its own in hash layers; random weights leave them all at expert 0."""
    for name, table_VK in model.named_buffers():
        if name.endswith("tid2eid"):
            table_VK.copy_((torch.arange(len(table_VK)).unsqueeze(1) + torch.arange(table_VK.shape[1])) % 4)


def small_options(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the small sizes that a configuration knows."""
    known = {field.name for field in dataclasses.fields(config_class)}
    return {name: size for name, size in SIZES.items() if name in known}


def _classes(family: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    root = f"transformers.models.{family}"
    modeling = importlib.import_module(f"{root}.modeling_{family}")
    own = [each for each in vars(modeling).values() if inspect.isclass(each) and each.__module__ == modeling.__name__]
    models = [each for each in own if issubclass(each, PreTrainedModel) and inspect.isclass(each.config_class)]
    endings = ("ForCausalLM", "TextModel", "ForConditionalGeneration", "Model", "Backbone")
    for ending in endings:
        for each in models:
            if each.__name__.endswith(ending) and not each.__name__.endswith("PreTrainedModel"):
                return each.config_class, each
    raise LookupError(family)
