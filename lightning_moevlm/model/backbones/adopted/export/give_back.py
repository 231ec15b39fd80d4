"""Takes our layers and adapters out of an adopted model: what is left is a model of transformers alone."""

import copy
from collections.abc import Mapping
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


def find_own_routers(model: nn.Module) -> dict[str, nn.Module | None]:
    """Return the model's own routers by their paths, with the weights of ours that stand there.

    None: ours decides otherwise than the model's own can. Replaced ones come in fp32, in which they are compared.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, AdoptedMoE)}
    return {path: _router_of(model, path, layer) for path, layer in layers.items()}


def put_back(model: nn.Module, routers: Mapping[str, nn.Module]) -> None:
    """Put routers where our layers stand, in place, and let transformers run the experts."""
    dispatchers = [module.dispatcher for module in model.modules() if isinstance(module, AdoptedMoE)]
    for path, router in routers.items():
        model.set_submodule(path, router)
    if any(isinstance(dispatcher, OurDispatch) for dispatcher in dispatchers):
        give_back(model)


def give_back_routers(model: nn.Module) -> None:
    """Put the model's own routers back where our layers stand, in place, with the weights of ours in their dtype.

    Raises:
        UserError: a router of ours that decides otherwise than the model's own can.
    """
    routers: dict[str, nn.Module] = {}
    for path, router in find_own_routers(model).items():
        layer = model.get_submodule(path)
        assert isinstance(layer, AdoptedMoE)
        if router is None:
            raise UserError(
                f"{type(layer.router).__name__} at {path} decides as no router of {type(model).__name__} in "
                "transformers does: write --format hf, which saves the whole model with a class of its own, or train "
                "with model.backbone.router null or one that takes the model's weights (`moevlm describe` says which)"
            )
        dtypes = {name: value.dtype for name, value in layer.theirs.state_dict().items()}
        for name, tensor in router.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(dtypes[name])
        routers[path] = router
    put_back(model, routers)


@torch.no_grad()
def _router_of(model: nn.Module, path: str, layer: AdoptedMoE) -> nn.Module | None:
    if isinstance(layer.router, TheirRouter):
        return layer.router.theirs
    router, rows = layer.router, layer.router.rows()
    if rows is None or not getattr(router, "keeps_weights", False):
        return None
    theirs = copy.deepcopy(layer.replaced[0]).to(rows.device, torch.float32)
    own_rows = like_rows(theirs, rows)
    if own_rows is None:
        return None
    own_rows.copy_(rows)
    bias_AE, own = getattr(router, "bias_AE", None), biases_of(theirs, len(rows))
    if bias_AE is not None:
        if not torch.equal(bias_AE, bias_AE[:1].expand_as(bias_AE)) or (bool(bias_AE.any()) and not own):
            return None
        for each in own:
            each.copy_(bias_AE[0].view_as(each))
    trial = copy.deepcopy(theirs).cpu().eval()
    twin = copy.deepcopy(router).cpu().float().eval()
    sample = torch.Generator("cpu").manual_seed(0)
    tokens_TD = torch.randn(_NUM_TRIALS, layer.dim, generator=sample, device="cpu")
    answer = ask(trial, model.get_submodule(path.rpartition(".")[0]), tokens_TD)
    if isinstance(answer, str):
        return None
    factor = compare(twin, tokens_TD, answer[layer.order.indices], answer[layer.order.weights])
    if factor is None or abs(factor / layer.factor - 1) > _CLOSE:
        return None
    return theirs.train(layer.training)
