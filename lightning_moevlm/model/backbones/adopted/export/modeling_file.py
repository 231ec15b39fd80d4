"""A model as a class of our small file, for routers or mixtures that no class of transformers has.

The file lies beside the weights. `trust_remote_code=True` lets transformers load it.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones.adopted.export.scoring import Scoring
from lightning_moevlm.model.backbones.adopted.routing._adopted_moe import AdoptedMoE
from lightning_moevlm.model.backbones.adopted.upcycling._upcycled_experts import UpcycledExperts
from lightning_moevlm.model.backbones.adopted.upcycling._upcycled_moe import UpcycledMoE

FILE = "modeling_moevlm.py"
_SOURCE = Path(__file__).with_name(FILE)


@torch.no_grad()
def as_own_class(
    model: Any, layers: Mapping[str, AdoptedMoE | UpcycledMoE], scorings: Mapping[str, Scoring], folder: Path
) -> Any:
    """Write the file, and return a model of its class that shares the weights.

    Args:
        model: with the layers; no others of ours are in it.
        layers: routers and mixtures that transformers has not, by their path.
        scorings: how their routers decide, likewise.
        folder: that the model will be saved to.

    Raises:
        UserError: a module of the model that it does not know.
    """
    from transformers.initialization import no_init_weights

    own, body = type(model).__name__, type(getattr(model, model.base_model_prefix)).__name__
    module = _write(own, body, folder)
    options = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        options.pop(name, None)
    config = getattr(module, f"Routed{own}").config_class(**options)
    config.mixtures = {path: _describe(layer, scorings[path]) for path, layer in layers.items()}
    for part in (config, config.get_text_config()):
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False  # transformers collects them by the class of the router
    auto = "AutoModelForImageTextToText" if hasattr(model.config, "vision_config") else "AutoModelForCausalLM"
    config.auto_map = {
        "AutoConfig": f"{_SOURCE.stem}.{type(config).__name__}",
        "AutoModel": f"{_SOURCE.stem}.Routed{body}",
        auto: f"{_SOURCE.stem}.Routed{own}",
    }
    with no_init_weights(), torch.device("meta"):
        target = getattr(module, f"Routed{own}")(config)
    state = model.state_dict()
    for path, layer in layers.items():
        state |= _weights(path, layer, scorings[path])
    missing = target.load_state_dict(state, strict=False, assign=True).missing_keys
    if missing:
        raise UserError(f"{own} has {missing[0]}, which the small file does not know: write --format torch")
    for name, buffer in target.named_buffers():
        if buffer.is_meta:  # it is never saved
            place, _, last = name.rpartition(".")
            setattr(target.get_submodule(place), last, model.get_buffer(name))
    target.tie_weights()
    target.generation_config = model.generation_config
    return target.eval()


def router_of(path: str, layer: nn.Module) -> str:
    """Return the path of the router of a layer in a model of the file's class."""
    return f"{path}.router" if isinstance(layer, UpcycledMoE) else path


def _describe(layer: AdoptedMoE | UpcycledMoE, scoring: Scoring) -> dict[str, Any]:
    num_experts, dim = scoring.rows_ED.shape
    router = {
        "dim": dim,
        "num_experts": num_experts,
        "top_k": scoring.top_k,
        "score": scoring.score,
        "weight_score": scoring.weight_score,
        "renormalise": scoring.renormalise,
        "factor": layer.factor if isinstance(layer, AdoptedMoE) else 1.0,
        "groups": None if scoring.groups is None else dataclasses.asdict(scoring.groups),
    }
    if isinstance(layer, AdoptedMoE):
        return {"router": router}
    experts = layer.experts
    assert isinstance(experts, UpcycledExperts)
    sizes = {
        "hidden_dim": experts.hidden_dim,
        "parts": list(experts.parts()),
        "activation": layer.dense.form.activation,
    }
    return {"router": router, "experts": sizes}


def _weights(path: str, layer: AdoptedMoE | UpcycledMoE, scoring: Scoring) -> dict[str, Tensor]:
    router = router_of(path, layer)
    bias_E = torch.zeros(len(scoring.rows_ED), dtype=torch.float32) if scoring.bias_E is None else scoring.bias_E
    found = {f"{router}.weight": scoring.rows_ED, f"{router}.bias": bias_E}
    if isinstance(layer, UpcycledMoE):
        for part, stack in layer.experts.parts().items():  # type: ignore[operator]
            found[f"{path}.{part}"] = (stack.squeeze(1) if part.endswith("_bias") else stack).detach()
    return found


def _write(own: str, body: str, folder: Path) -> ModuleType:
    """Write the file for a class of transformers and its body, and return it as a module."""
    text = _SOURCE.read_text("utf-8").replace("LlamaForCausalLM", own).replace("LlamaModel", body)
    text = text.replace("LlamaConfig", f"{body.removesuffix('Model')}Config")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    path.write_text(text, "utf-8")
    module = ModuleType(f"{_SOURCE.stem}_{own}")
    sys.modules[module.__name__] = module  # transformers looks classes up by their module
    exec(compile(text, path, "exec"), module.__dict__)  # an import would leave bytecode in the folder
    return module
