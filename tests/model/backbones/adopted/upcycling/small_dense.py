"""Dense models of transformers small enough to build in milliseconds."""

from typing import Any

from lightning_moevlm.model.backbones import HuggingFaceModel
from lightning_moevlm.model.backbones.adopted.upcycling.upcycle import UpcycleDense
from tests.model.backbones.adopted.small_hugging_face import LLAVA, QWEN, small_hugging_face

TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip

QWEN_VL: dict[str, Any] = QWEN | {
    "model_type": "qwen3_vl", "text_config": TEXT | {"rope_parameters": QWEN["text_config"]["rope_parameters"]}
}  # fmt: skip
FOUR = UpcycleDense(num_experts=4)
LLAVA_QWEN2: dict[str, Any] = LLAVA | {"text_config": TEXT | {"model_type": "qwen2"}}


def config_of(family: str) -> dict[str, Any]:
    """The configuration of a family of language models, or of a vision-language model."""
    own = {"model_type": family} | TEXT
    if family == "opt":
        own = {name: size for name, size in own.items() if name not in ("intermediate_size", "head_dim")}
    return {"qwen3_vl": QWEN_VL, "llava": LLAVA_QWEN2}.get(family, own)


def small_upcycled(family: str, upcycle: UpcycleDense | None = FOUR, **options: Any) -> HuggingFaceModel:
    """Width 32, 48 hidden units, 4 experts, 16 px images in 4 tokens, texts of 8 out of 300 tokens."""
    return small_hugging_face(config_of(family), upcycle=upcycle, **options)
