"""Saves low-rank adapters alone, with the routers and experts trained beside them, as peft loads them.

    peft.PeftModel.from_pretrained(the checkpoint that they were trained on, the folder)

Before anything is kept, that is done, and must compute the logits of the trained model.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import JoinedChats
from lightning_moevlm.model.backbones.adopted.export.give_back import give_back_routers
from lightning_moevlm.model.backbones.adopted.export.save import CLOSE, compute_logits, refuse_limit
from lightning_moevlm.model.backbones.adopted.hugging_face import HuggingFaceModel
from lightning_moevlm.model.backbones.adopted.routing._adopted_moe import AdoptedMoE
from lightning_moevlm.model.backbones.adopted.routing._their_router import TheirBiasRouter

_PREFIX = "base_model.model"
_WEIGHTS = "adapter_model.safetensors"


class SavedAdapter(NamedTuple):
    """What was written.

    num_adapters: low-rank ones. modules: that are saved whole, routers and experts.
    auto_class: of transformers that loads the checkpoint. difference, scale: see `Saved`.
    """

    num_adapters: int
    modules: tuple[str, ...]
    auto_class: str
    difference: float
    scale: float


@torch.no_grad()
def save_adapter(
    backbone: HuggingFaceModel, path: str | None, folder: Path, chats: JoinedChats | None = None
) -> SavedAdapter:
    """Write adapters to a folder; the backbone is used up.

    Args:
        backbone: trained with `lora`.
        path: of the checkpoint that they belong to.
        folder: that exists.
        chats: conversations that the result is compared on; None takes random images and token ids.

    Raises:
        UserError: no adapters, no checkpoint, routers that transformers cannot compute, or other logits.
    """
    model = backbone.model
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        raise UserError("this run has no low-rank adapters: leave --format peft out, or train with model.backbone.lora")
    if path is None:
        raise UserError(
            "low-rank adapters belong to a checkpoint, and this run began with random weights (model.backbone.config): "
            "write --format hf, which merges them"
        )
    layers = {place: layer for place, layer in model.named_modules() if isinstance(layer, AdoptedMoE)}
    if len(layers) < len(backbone.layers):
        raise UserError(
            "upcycled experts are no part of the checkpoint: write --format hf, which saves the whole model"
        )
    refuse_limit(backbone)
    import peft
    import transformers

    backbone.eval()
    modules = _trained(model, layers)
    give_back_routers(model)
    state = {
        f"{_PREFIX}.{name.replace('.default.', '.')}": value.clone().contiguous()
        for name, value in model.state_dict().items()
        if "lora_" in name
    }
    num_adapters = sum("lora_A" in name for name in state)
    for module in modules:
        for name, value in model.get_submodule(module).state_dict().items():
            state[f"{_PREFIX}.{module}.{name}"] = value.clone().contiguous()
    config = copy.deepcopy(config)
    config.modules_to_save = sorted({".".join(module.split(".")[-2:]) for module in modules}) or None
    config.base_model_name_or_path, config.inference_mode = path, True
    config.save_pretrained(folder)
    save_file(state, folder / _WEIGHTS, {"format": "pt"})
    dtype = model.dtype  # of the checkpoint in training, whose rounding the adapters were trained on
    ours = compute_logits(backbone.float(), chats)
    sees = hasattr(model.config, "vision_config")
    auto_class = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    base = getattr(transformers, auto_class).from_pretrained(path, local_files_only=True, dtype=dtype)
    backbone.model = peft.PeftModel.from_pretrained(base, folder).get_base_model().eval().float()
    difference, scale = float((compute_logits(backbone, chats) - ours).abs().max()), float(ours.abs().max())
    if not difference <= CLOSE * scale:
        raise UserError(
            f"peft computes other logits than the trained model ({difference:.2g} of {scale:.2g}), so nothing was "
            "written: write --format hf"
        )
    return SavedAdapter(num_adapters, tuple(modules), auto_class, difference, scale)


def _trained(model: nn.Module, layers: dict[str, AdoptedMoE]) -> list[str]:
    """Return the paths of routers and experts that may differ from the checkpoint's."""
    found: list[str] = []
    for path, layer in layers.items():
        moves = layer.replaced or isinstance(layer.router, TheirBiasRouter)
        if moves or any(parameter.requires_grad for parameter in layer.router.parameters()):
            found.append(path)
        experts = f"{path.rpartition('.')[0]}.experts"
        module: Any = model.get_submodule(experts)
        if any(parameter.requires_grad for parameter in module.parameters()):
            found.append(experts)
    return found
