"""An upcycled model as a class of our small file, for families that transformers does not have with experts.

The file lies beside the weights. `trust_remote_code=True` lets transformers load it.
"""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lightning_moevlm.model.backbones.adopted.export.scoring import Scoring
from lightning_moevlm.model.backbones.adopted.upcycling._upcycled_experts import UpcycledExperts
from lightning_moevlm.model.backbones.adopted.upcycling._upcycled_moe import UpcycledMoE

FILE = "modeling_upcycled.py"
_SOURCE = Path(__file__).with_name(FILE)


@torch.no_grad()
def as_own_class(model: Any, layers: Mapping[str, UpcycledMoE], scorings: Mapping[str, Scoring], folder: Path) -> Any:
    """Write the file, and return a model of its class with copies of the weights.

    Args:
        model: with the mixtures.
        layers: they, by their path.
        scorings: how their routers decide, likewise.
        folder: that the model will be saved to.
    """
    from transformers.initialization import no_init_weights

    module = _write(type(model).__name__, folder)
    sees = hasattr(model.config, "vision_config")
    auto = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    options = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        options.pop(name, None)
    config = module.UpcycledConfig(**options)
    config.mixtures = _describe(layers, scorings)
    stem = _SOURCE.stem
    config.auto_map = {"AutoConfig": f"{stem}.UpcycledConfig", auto: f"{stem}.UpcycledModel"}
    with no_init_weights(), torch.random.fork_rng(devices=[]):
        target = module.UpcycledModel(config)
    target.generation_config = model.generation_config
    here = target.state_dict()
    for name, value in model.state_dict().items():
        if name in here:  # all but those of the mixtures
            here[name].copy_(value)
    target.tie_weights()
    for path, layer in layers.items():
        mixture, scoring = target.get_submodule(path), scorings[path]
        mixture.router.weight.copy_(scoring.rows_ED)
        if scoring.bias_E is not None:
            mixture.bias.copy_(scoring.bias_E)
        for part, stack in layer.experts.parts().items():  # type: ignore[operator]
            getattr(mixture, part).copy_(stack.squeeze(1) if part.endswith("_bias") else stack)
    return target.eval()


def _describe(layers: Mapping[str, UpcycledMoE], scorings: Mapping[str, Scoring]) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for path, layer in layers.items():
        experts = layer.experts
        assert isinstance(experts, UpcycledExperts)
        sizes[path] = {
            "dim": experts.dim,
            "hidden_dim": experts.hidden_dim,
            "parts": list(experts.parts()),
            "activation": layer.dense.form.activation,
        }
    scoring = next(iter(scorings.values()))
    return {
        "num_experts": next(iter(layers.values())).num_experts,
        "top_k": scoring.top_k,
        "score": scoring.score,
        "renormalise": scoring.renormalise,
        "has_bias": any(each.bias_E is not None for each in scorings.values()),
        "layers": sizes,
    }


def _write(dense: str, folder: Path) -> ModuleType:
    """Write the file for a dense class, and return it as a module."""
    text = _SOURCE.read_text("utf-8").replace('DENSE = "LlamaForCausalLM"', f'DENSE = "{dense}"')
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    path.write_text(text, "utf-8")
    name = f"{_SOURCE.stem}_{dense}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # transformers looks classes up by their module
    spec.loader.exec_module(module)
    return module
