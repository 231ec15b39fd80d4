"""Takes our layers and adapters out of an adopted model: what is left is a model of transformers alone."""

import copy
from typing import Any

import torch
from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones.adopted.routing._adopted_moe import AdoptedMoE
from lightning_moevlm.model.backbones.adopted.routing._their_router import TheirRouter
from lightning_moevlm.model.backbones.adopted.routing.our_dispatch import OurDispatch, give_back
from lightning_moevlm.model.backbones.adopted.routing.replace import biases_of, compare, like_rows
from lightning_moevlm.model.backbones.adopted.routing.seam import ask

_NUM_TRIALS = 64
_CLOSE = 1e-3


def merge_adapters(model: nn.Module) -> int:
    """Add low-rank adapters to the matrices beside them, in place, and return how many there were."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return 0  # then there are none
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for path, layer in layers.items():
        tuner: Any = layer
        tuner.merge(safe_merge=True)
        model.set_submodule(path, tuner.get_base_layer())
    return len(layers)


def give_back_routers(model: nn.Module) -> None:
    """Put the model's own routers back where our layers stand, in place, with the weights of ours.

    Raises:
        UserError: a router of ours that decides otherwise than the model's own can.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, AdoptedMoE)}
    theirs = {path: _router_of(model, path, layer) for path, layer in layers.items()}
    for path, router in theirs.items():
        model.set_submodule(path, router)
    if any(isinstance(layer.dispatcher, OurDispatch) for layer in layers.values()):
        give_back(model)


@torch.no_grad()
def _router_of(model: nn.Module, path: str, layer: AdoptedMoE) -> nn.Module:
    if isinstance(layer.router, TheirRouter):
        return layer.router.theirs
    theirs, router = layer.replaced[0], layer.router
    name = type(router).__name__
    refusal = UserError(
        f"{name} at {path} decides as no router of {type(model).__name__} in transformers does, so transformers could "
        "not load it: write --format torch, or train with model.backbone.router null or one that takes the model's "
        "weights (`moevlm describe` says which)"
    )
    rows = router.rows()
    own_rows = like_rows(theirs, rows) if getattr(router, "keeps_weights", False) and rows is not None else None
    if own_rows is None or rows is None:
        raise refusal
    theirs = theirs.to(own_rows.device)
    own_rows.copy_(rows)
    bias_AE, own = getattr(router, "bias_AE", None), biases_of(theirs, len(rows))
    if bias_AE is not None:
        if not torch.equal(bias_AE, bias_AE[:1].expand_as(bias_AE)) or (bool(bias_AE.any()) and not own):
            raise refusal
        for each in own:
            each.copy_(bias_AE[0].view_as(each))
    trial = copy.deepcopy(theirs).cpu().float().eval()
    twin = copy.deepcopy(router).cpu().float().eval()
    sample = torch.Generator("cpu").manual_seed(0)
    tokens_TD = torch.randn(_NUM_TRIALS, layer.dim, generator=sample, device="cpu")
    answer = ask(trial, model.get_submodule(path.rpartition(".")[0]), tokens_TD)
    factor = (
        None
        if isinstance(answer, str)
        else compare(twin, tokens_TD, answer[layer.order.indices], answer[layer.order.weights])
    )
    if factor is None or abs(factor / layer.factor - 1) > _CLOSE:
        raise refusal
    return theirs.train(layer.training)
