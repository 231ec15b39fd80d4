"""Saves an adopted or upcycled model as transformers loads it.

    adopted       the model itself with its own routers, if they can decide as the trained ones; else
    upcycled      the family of transformers that is the dense one with experts; else
    both          a class of our small file

Low-rank adapters are merged. Before anything is kept, the model that is saved computes the logits of random images and
texts, and its weights are read back; the largest difference to ours is returned.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import JoinedChats
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.special_tokens import SPECIAL_TOKENS
from lightning_moevlm.model.backbones.adopted.export.give_back import find_own_routers, merge_adapters, put_back
from lightning_moevlm.model.backbones.adopted.export.modeling_file import as_own_class, router_of
from lightning_moevlm.model.backbones.adopted.export.moe_class import as_moe_class
from lightning_moevlm.model.backbones.adopted.export.scoring import Scoring, find_scoring
from lightning_moevlm.model.backbones.adopted.hugging_face import HuggingFaceModel
from lightning_moevlm.model.backbones.adopted.routing._adopted_moe import AdoptedMoE
from lightning_moevlm.model.backbones.adopted.upcycling._upcycled_moe import UpcycledMoE

_NUM_SAMPLES, _NUM_IDS = 2, 1000
CLOSE = 1e-3


class Saved(NamedTuple):
    """What was written.

    model_class: that loads it. model_type: of its configuration. text_type: of its language model.
    sees: whether it takes images.
    why_own: why no class of transformers was found, so that it is in our small file; empty if one was.
    difference: largest one of the logits of random samples to ours, in fp32. scale: largest logit.
    num_adapters: that were merged.
    rounded: dtype that routers were rounded to; empty if they were not.
    """

    model_class: str
    model_type: str
    text_type: str
    sees: bool
    why_own: str
    difference: float
    scale: float
    num_adapters: int
    rounded: str

    @property
    def is_own(self) -> bool:
        """Whether the class is in our small file."""
        return bool(self.why_own)


@torch.no_grad()
def save_for_transformers(backbone: HuggingFaceModel, folder: Path, chats: JoinedChats | None = None) -> Saved:
    """Write weights and configuration to a folder; the backbone is used up.

    Args:
        backbone: the trained model.
        folder: that need not exist.
        chats: conversations that the result is compared on; None takes random images and token ids.

    Raises:
        UserError: routers that transformers cannot compute, or a model that computes or reads something else.
    """
    refuse_limit(backbone)
    backbone.eval()
    num_adapters = merge_adapters(backbone.model)
    dtype, dtypes = backbone.model.dtype, _dtypes(backbone.model)
    backbone.float()
    ours = compute_logits(backbone, chats)
    model, why_own, in_fp32 = _convert(backbone, folder, chats)
    backbone.model = model
    difference, scale = float((compute_logits(backbone, chats) - ours).abs().max()), float(ours.abs().max())
    if not difference <= CLOSE * scale:
        raise UserError(
            f"{type(model).__name__} of transformers computes other logits than the trained model ({difference:.2g} of "
            f"{scale:.2g}), so nothing was written: write --format torch"
        )
    rounded = _restore(model, in_fp32, dtypes, dtype)
    model.save_pretrained(folder)
    _read_back(model, folder, dtype)
    config, sees = model.config, hasattr(model.config, "vision_config")
    name, text_type = type(model).__name__, config.get_text_config().model_type
    return Saved(name, config.model_type, text_type, sees, why_own, difference, scale, num_adapters, rounded)


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


class _Found(NamedTuple):
    """A model of transformers that computes what the trained one does.

    why_own: why it is of a class of our own; empty if it is not.
    in_fp32: paths of routers that stay in fp32.
    """

    model: Any
    why_own: str = ""
    in_fp32: tuple[str, ...] = ()


def _convert(backbone: HuggingFaceModel, folder: Path, chats: JoinedChats | None) -> _Found:
    """Return the model in transformers.

    Raises:
        UserError: a router that no file of ours can compute.
    """
    model = backbone.model
    routers = find_own_routers(model)
    put_back(model, {path: router for path, router in routers.items() if router is not None})
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, AdoptedMoE | UpcycledMoE)}
    if not layers:
        return _Found(model)
    scorings = {path: _find_scoring(layer) for path, layer in layers.items()}
    upcycled = {path: layer for path, layer in layers.items() if isinstance(layer, UpcycledMoE)}
    if upcycled:
        found = as_moe_class(model, upcycled, scorings)
        if not isinstance(found, str):
            ours, backbone.model = compute_logits(backbone, chats), found
            theirs = compute_logits(backbone, chats)
            backbone.model = model
            if float((theirs - ours).abs().max()) <= CLOSE * float(ours.abs().max()):
                return _Found(found)
        why_own = found if isinstance(found, str) else f"{type(found).__name__} computes something else"
    else:
        name = type(next(iter(layers.values())).router).__name__
        why_own = f"{name} decides as no router of {type(model).__name__} does"
    in_fp32 = tuple(router_of(path, layer) for path, layer in layers.items())
    return _Found(as_own_class(model, layers, scorings, folder), why_own, in_fp32)


def _find_scoring(layer: AdoptedMoE | UpcycledMoE) -> Scoring:
    scoring = find_scoring(layer.router, tuple(Modality) if layer.modality is None else (layer.modality,))
    if scoring is None:
        raise UserError(
            f"{type(layer.router).__name__} is no top-k of softmax, sigmoid or sqrt-softplus scores with one bias for "
            "all modalities, and no other can be computed in transformers: write --format torch, or train with "
            "TopKRouter or SigmoidBiasRouter"
        )
    return scoring


def compute_logits(backbone: HuggingFaceModel, chats: JoinedChats | None) -> Tensor:
    """Return the logits of conversations, or of random samples, with images if the model sees them."""
    if chats is not None:
        return backbone.predict_text(backbone.read_chats(chats).tokens_BSD[chats.valid_BS])
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


def _dtypes(model: Any) -> dict[str, torch.dtype]:
    """Return those of all tensors, and of routers where layers of ours stand, by their names in transformers."""
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    for path, layer in model.named_modules():
        if isinstance(layer, AdoptedMoE):
            dtypes |= {f"{path}.{name}": value.dtype for name, value in layer.theirs.state_dict().items()}
    return dtypes


def _restore(model: Any, in_fp32: tuple[str, ...], dtypes: dict[str, torch.dtype], dtype: torch.dtype) -> str:
    """Give tensors the dtypes that they had, and new ones that of the model; return the dtype that some are rounded to.

    Only routers can be: they are trained in fp32.
    """
    rounded = ""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and name.rpartition(".")[0] not in in_fp32:
            narrow = tensor.data.to(dtypes.get(name, dtype))
            if not torch.equal(narrow.float(), tensor.data):
                rounded = str(narrow.dtype).removeprefix("torch.")
            tensor.data = narrow
    return rounded


def _read_back(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Refuse a folder that transformers does not read as the model that was written.

    Raises:
        UserError: a weight differs.
    """
    written = type(model).from_pretrained(folder, local_files_only=True, dtype=dtype).state_dict()
    for name, tensor in model.state_dict().items():
        if name not in written or not torch.equal(tensor.to(written[name].dtype), written[name]):
            raise UserError(
                f"transformers reads {name} of {type(model).__name__} otherwise than it writes it, so nothing was "
                "written: write --format torch"
            )
