"""Puts our layers where a transformers model has its routers, and takes them out again."""

from collections.abc import Callable

from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones.adopted._adopted_moe import AdoptedMoE
from lightning_moevlm.model.backbones.adopted.current_pass import CurrentPass
from lightning_moevlm.model.backbones.adopted.seam import Seam, find_seams
from lightning_moevlm.model.routers import Router

MakeRouter = Callable[[nn.Module, Seam], Router]
"""Their router and its seam -> one of ours in its place."""


def adopt(model: nn.Module, current: CurrentPass, make_router: MakeRouter | None = None) -> dict[str, AdoptedMoE]:
    """Adopt every mixture of a model, in place.

    Args:
        model: of transformers.
        current: the pass that its layers will run in.
        make_router: null keeps their routers.

    Returns:
        The layers by their path in the model.

    Raises:
        UserError: the model has no mixture that can be adopted, or one that cannot.
    """
    if getattr(model, "_tp_size", None) or getattr(model, "_device_mesh", None) is not None:
        raise UserError(
            f"{type(model).__name__} shards its experts or tensors over devices, and its routers then name experts of "
            "one device: load it without tensor or expert parallelism"
        )
    seams, refusals = find_seams(model)
    if refusals:
        first = refusals[0]
        raise UserError(f"{type(model).__name__} cannot be adopted: at {first.path}, {first.reason}")
    if not seams:
        raise UserError(
            f"{type(model).__name__} has no router beside experts: name a mixture-of-experts model, such as "
            "Qwen3-VL-MoE or OLMoE"
        )
    layers: dict[str, AdoptedMoE] = {}
    for seam in seams:
        block = model.get_submodule(seam.path)
        theirs, experts = getattr(block, seam.name), block.experts
        assert isinstance(theirs, nn.Module) and isinstance(experts, nn.Module)
        router = None if make_router is None else make_router(theirs, seam)
        layer = AdoptedMoE(theirs, seam.gate, experts, current, seam.modality, router)
        layer.train(theirs.training)
        setattr(block, seam.name, layer)
        layers[f"{seam.path}.{seam.name}" if seam.path else seam.name] = layer
    return layers
