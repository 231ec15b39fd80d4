"""Walks every dense family of the installed transformers, and counts those whose feed-forwards are found.

Models have shapes alone. Vision-language models have their default sizes, and few blocks where that is possible.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto

from lightning_moevlm.model.backbones import adopted
from lightning_moevlm.model.backbones.adopted.upcycling.dense import find_feed_forwards
from tests.model.backbones.adopted.families import families, small_options

GUIDE = Path(adopted.__file__).with_name("README.md")
PEOPLE_TRAIN = {
    "llama", "mistral", "qwen2", "qwen3", "gemma3", "phi", "phi3", "olmo2", "smollm3", "cohere2", "glm4", "granite",
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "paligemma", "idefics3",
    "smolvlm", "mistral3", "glm4v", "mllama", "janus",
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,  # two hundred models: two minutes of CPU
    pytest.mark.timeout(1800),
    pytest.mark.skipif(transformers.__version__ != "5.23.0", reason="the counts are those of the pinned version"),
]


def small_language_model(family: str) -> Any:
    config_class = CONFIG_MAPPING[family]
    return AutoModelForCausalLM.from_config(config_class(**small_options(config_class)))


def vision_language_model(family: str) -> Any:
    config = CONFIG_MAPPING[family]()
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name in ("num_hidden_layers", "depth", "num_layers"):
            if getattr(part, "layer_types", None) is None and (getattr(part, name, None) or 0) > 4:
                setattr(part, name, 4)
    return AutoModelForImageTextToText.from_config(config)


def has_experts(model: torch.nn.Module) -> bool:
    return any(
        hasattr(block, "experts") and (hasattr(block, "gate") or hasattr(block, "router")) for block in model.modules()
    )


def test_most_dense_families_are_upcycled() -> None:
    walks = {
        "dense language models": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, small_language_model),
        "dense vision-language models": (
            modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, vision_language_model
        ),
    }  # fmt: skip
    with_experts, counts, upcycled = set(families()), {}, set()
    for kind, (names, build) in walks.items():
        found: dict[str, bool] = {}
        for family in names:
            if kind == "dense language models" and family in with_experts:
                continue
            try:
                with warnings.catch_warnings(), torch.device("meta"):
                    warnings.simplefilter("ignore")
                    model = build(family)
            except Exception:  # a family that cannot be built of these sizes says nothing
                continue
            if kind == "dense language models" or not has_experts(model):
                found[family] = bool(find_feed_forwards(model)[0])
        counts[kind] = f"{sum(found.values())} of {len(found)}"
        upcycled |= {family for family, is_found in found.items() if is_found}
    language, seeing = counts.values()
    assert not PEOPLE_TRAIN - upcycled
    words = " ".join(GUIDE.read_text("utf-8").split())
    assert (
        f"it upcycles {language} families of dense language models and {seeing} of dense vision-language models"
        in words
    )
