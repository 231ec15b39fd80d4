"""Saves an adopted or upcycled model as transformers loads it.

    adopted       the model itself, with its own routers
    upcycled      the family of transformers that is the dense one with experts; else a class of our small file

Low-rank adapters are merged. Before anything is kept, the model that is saved computes the logits of random images and
texts; the largest difference to ours is returned.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.special_tokens import SPECIAL_TOKENS
from lightning_moevlm.model.backbones.adopted.export.give_back import give_back_routers, merge_adapters
from lightning_moevlm.model.backbones.adopted.export.modeling_file import as_own_class
from lightning_moevlm.model.backbones.adopted.export.moe_class import as_moe_class
from lightning_moevlm.model.backbones.adopted.export.scoring import find_scoring
from lightning_moevlm.model.backbones.adopted.hugging_face import HuggingFaceModel
from lightning_moevlm.model.backbones.adopted.upcycling._upcycled_moe import UpcycledMoE

_NUM_SAMPLES, _NUM_IDS = 2, 1000
CLOSE = 1e-3


class Saved(NamedTuple):
    """What was written.

    model_class: that loads it. model_type: of its configuration. text_type: of its language model.
    sees: whether it takes images.
    is_own: whether the class is in our small file.
    why_own: why no class of transformers was found.
    difference: largest one of the logits of random samples to ours, in fp32. scale: largest logit.
    num_adapters: that were merged.
    rounded: dtype that routers were rounded to; empty if they were not.
    """

    model_class: str
    model_type: str
    text_type: str
    sees: bool
    is_own: bool
    why_own: str
    difference: float
    scale: float
    num_adapters: int
    rounded: str


@torch.no_grad()
def save_for_transformers(backbone: HuggingFaceModel, folder: Path) -> Saved:
    """Write weights and configuration to a folder; the backbone is used up.

    Raises:
        UserError: routers that transformers cannot compute, or a model that computes something else.
    """
    refuse_limit(backbone)
    backbone.eval()
    model = backbone.model
    num_adapters = merge_adapters(model)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    dtype = model.dtype
    backbone.float()
    ours = compute_logits(backbone)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, UpcycledMoE)}
    why_own, is_own = "", False
    if layers:
        found, why_own = _convert(backbone, layers, folder)
        is_own = bool(why_own)
        rounded = "" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    else:
        give_back_routers(model)
        found, rounded = model, ""
    backbone.model = found
    difference, scale = float((compute_logits(backbone) - ours).abs().max()), float(ours.abs().max())
    if not difference <= CLOSE * scale:
        raise UserError(
            f"{type(found).__name__} of transformers computes other logits than the trained model ({difference:.2g} of "
            f"{scale:.2g}), so nothing was written: write --format torch"
        )
    _restore(found, dtypes, dtype)
    found.save_pretrained(folder)
    sees = hasattr(found.config, "vision_config")
    name, config = type(found).__name__, found.config
    text_type = config.get_text_config().model_type
    return Saved(name, config.model_type, text_type, sees, is_own, why_own, difference, scale, num_adapters, rounded)


def refuse_limit(backbone: HuggingFaceModel) -> None:
    """Refuse a capacity in evaluation.

    Raises:
        UserError: there is one.
    """
    for layer in backbone.layers:
        limit = None if layer.capacity is None else layer.capacity.evaluation_limit
        if limit is not None:
            raise UserError(
                f"capacity.eval_factor is {limit}, and transformers has no capacity, so it would compute other logits: "
                "write --format torch"
            )


def _convert(backbone: HuggingFaceModel, layers: dict[str, UpcycledMoE], folder: Path) -> tuple[Any, str]:
    """Return the model of an upcycled one in transformers, and why it is of a class of our own."""
    scorings = {path: find_scoring(layer.router) for path, layer in layers.items()}
    decided = {path: scoring for path, scoring in scorings.items() if scoring is not None}
    if len(decided) < len(layers):
        name = type(next(iter(layers.values())).router).__name__
        raise UserError(
            f"{name} is no top-k of softmax or sigmoid scores with one bias for all modalities, and no other can be "
            "computed in transformers: write --format torch, or train with TopKRouter or SigmoidBiasRouter"
        )
    model = backbone.model
    found = as_moe_class(model, layers, decided)
    if isinstance(found, str):
        return as_own_class(model, layers, decided, folder), found
    ours, backbone.model = compute_logits(backbone), found
    theirs = compute_logits(backbone)
    backbone.model = model
    if float((theirs - ours).abs().max()) <= CLOSE * float(ours.abs().max()):
        return found, ""
    return as_own_class(model, layers, decided, folder), f"{type(found).__name__} computes something else"


def compute_logits(backbone: HuggingFaceModel) -> Tensor:
    """Return the logits of random samples, with images if the model sees them."""
    sample = torch.Generator("cpu").manual_seed(0)
    spec, device = backbone.spec, backbone.text_embedding_VD.device
    shape = (_NUM_SAMPLES, min(spec.max_text_len, 16))
    last = min(spec.vocab_size, _NUM_IDS)  # ids that stand for images come later
    text_BL = torch.randint(len(SPECIAL_TOKENS), last, shape, generator=sample, device="cpu").to(device)
    images = None
    if backbone.images is not None:
        size = (_NUM_SAMPLES, 3, spec.image_size, spec.image_size)
        images = torch.randint(0, 256, size, generator=sample, dtype=torch.uint8, device="cpu").to(device)
    output = backbone(images, text_BL, torch.ones_like(text_BL, dtype=torch.bool))
    return backbone.predict_text(output.tokens_BSD)


def _restore(model: Any, dtypes: dict[str, torch.dtype], dtype: torch.dtype) -> None:
    """Give tensors the dtypes that they had; new ones that of the model."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes.get(name, dtype))
