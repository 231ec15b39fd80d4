"""An upcycled model as the mixture-of-experts family of transformers that is its dense family with experts.

    llama, mistral -> mixtral     qwen2 -> qwen2_moe     qwen3 -> qwen3_moe     qwen3_vl -> qwen3_vl_moe

A language model inside a vision-language model (LLaVA) is exchanged in the same way. Everything but the mixtures has
the same names in both families. Whether the result computes the same is tested by whoever asks for it.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from lightning_moevlm.model.backbones.adopted.export.scoring import Scoring
from lightning_moevlm.model.backbones.adopted.routing.seam import find_seams
from lightning_moevlm.model.backbones.adopted.upcycling._upcycled_experts import UpcycledExperts
from lightning_moevlm.model.backbones.adopted.upcycling._upcycled_moe import UpcycledMoE

_FAMILIES = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "qwen3_vl": "qwen3_vl_moe",
    "qwen3_vl_text": "qwen3_vl_moe_text",
}
_OF_ONE_CLASS = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")


@torch.no_grad()
def as_moe_class(model: Any, layers: Mapping[str, UpcycledMoE], scorings: Mapping[str, Scoring]) -> Any:
    """Return a model of the matching family with copies of the weights, or why there is none, as text.

    Args:
        model: with the mixtures.
        layers: they, by their path.
        scorings: how their routers decide, likewise.
    """
    text = model.config.get_text_config()
    family = _FAMILIES.get(text.model_type)
    if family is None:
        return f"transformers has no family that is {text.model_type} with experts"
    first, scoring = next(iter(layers.values())), next(iter(scorings.values()))
    experts = first.experts
    assert isinstance(experts, UpcycledExperts)
    if not all(each.is_plain for each in scorings.values()):
        return f"{family} routes by the softmax alone"
    if set(experts.parts()) != {"gate", "up", "down"}:
        return f"experts of {family} have a gate and no biases"
    blocks = {layer.dense.block for layer in layers.values()}
    dense = [block for block in range(text.num_hidden_layers) if block not in blocks]
    sizes = {
        "num_experts": first.num_experts,
        "num_local_experts": first.num_experts,
        "num_experts_per_tok": scoring.top_k,
        "moe_intermediate_size": experts.hidden_dim,
        "norm_topk_prob": scoring.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "shared_expert_intermediate_size": 0,
    }
    config = _convert(model.config, sizes)
    if isinstance(config, str):
        return config
    target = _build(model, config)
    seams, _ = find_seams(target)
    if {seam.path for seam in seams} != set(layers):
        return (
            f"{family} cannot have dense feed-forwards in blocks {dense}" if dense else f"{family} has other mixtures"
        )
    missing = _fill(target, model, layers, scorings)
    return f"{family} has no place for {missing}" if missing else target


def _convert(config: Any, sizes: dict[str, Any]) -> Any:
    """Return the configuration of the family with experts, or why not."""
    from transformers import AutoConfig

    text = config.get_text_config()
    options = _options(config)
    if text is not config:
        key = next((name for name in config.sub_configs if getattr(config, name, None) is text), "")
        if not key:
            return f"{config.model_type} does not say where its language model is"
        inner = _with_experts(_FAMILIES[text.model_type], _options(text), sizes)
        options[key] = inner | ({} if config.model_type in _FAMILIES else {"model_type": _FAMILIES[text.model_type]})
        return AutoConfig.for_model(_FAMILIES.get(config.model_type, config.model_type), **options)
    family = _FAMILIES[text.model_type]
    return AutoConfig.for_model(family, **_with_experts(family, options, sizes))


def _with_experts(family: str, options: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    known = {field.name for field in fields(CONFIG_MAPPING[family])}
    if "moe_intermediate_size" not in known:  # Mixtral's experts are as wide as its feed-forwards would be
        options = options | {"intermediate_size": sizes["moe_intermediate_size"]}
    return {name: value for name, value in (options | sizes).items() if name in known}


def _options(config: Any) -> dict[str, Any]:
    options = {name: value for name, value in config.to_dict().items() if name not in _OF_ONE_CLASS}
    for name, value in options.items():
        if isinstance(value, dict) and name.endswith("_config") and config.model_type in _FAMILIES:
            options[name] = {key: each for key, each in value.items() if key not in _OF_ONE_CLASS}
    return options


def _build(model: Any, config: Any) -> Any:
    import transformers
    from transformers.initialization import no_init_weights

    sees = hasattr(config, "vision_config")
    loader = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    with no_init_weights(), torch.random.fork_rng(devices=[]):
        target = loader.from_config(config, dtype=torch.float32)
    target.generation_config = model.generation_config
    return target.eval()


def _fill(target: Any, model: Any, layers: Mapping[str, UpcycledMoE], scorings: Mapping[str, Scoring]) -> str:
    """Copy the weights, and return the name of a tensor that has no counterpart; empty if all have."""
    there = {
        name: value for name, value in model.state_dict().items() if not any(_within(name, path) for path in layers)
    }
    here = {
        name: value for name, value in target.state_dict().items() if not any(_within(name, path) for path in layers)
    }
    for name in (*there, *here):
        if name not in here or name not in there or here[name].shape != there[name].shape:
            return name
        here[name].copy_(there[name])
    target.tie_weights()
    for path, layer in layers.items():
        block = target.get_submodule(path)
        stacks = layer.experts.parts()  # type: ignore[operator]
        joined = torch.cat([stacks["gate"], stacks["up"]], dim=2).transpose(1, 2)
        filled = {"gate.weight": scorings[path].rows_ED, "experts.gate_up_proj": joined,
                  "experts.down_proj": stacks["down"].transpose(1, 2)}  # fmt: skip
        for name, parameter in block.named_parameters():
            if name not in filled:
                parameter.zero_()  # a shared expert, which adds nothing then
            elif parameter.shape != filled[name].shape:
                return f"{path}.{name}"
            else:
                parameter.copy_(filled[name])
    return ""


def _within(name: str, path: str) -> bool:
    return name.startswith(f"{path}.")
