"""Puts our layers where a transformers model has its routers, and takes them out again."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones.adopted.routing._adopted_moe import AdoptedMoE
from lightning_moevlm.model.backbones.adopted.routing.current_pass import CurrentPass
from lightning_moevlm.model.backbones.adopted.routing.our_dispatch import take_over
from lightning_moevlm.model.backbones.adopted.routing.replace import carry, replace_router
from lightning_moevlm.model.backbones.adopted.routing.seam import find_seams
from lightning_moevlm.model.dispatch import Capacity, Dispatcher
from lightning_moevlm.model.routers import Router


def adopt(
    model: nn.Module,
    current: CurrentPass,
    router: Callable[[int, int], Router] | None = None,
    bias_rate: float | None = None,
    capacity: Capacity | None = None,
    dispatcher: Dispatcher | None = None,
) -> dict[str, AdoptedMoE]:
    """Adopt every mixture of a model, in place.

    Args:
        model: of transformers.
        current: the pass that its layers will run in.
        router: factory (dim, num_experts) -> one of ours in place of each of theirs; None keeps theirs.
        bias_rate: of their own balancing bias; None leaves it alone.
        capacity: of experts, whichever router chooses them; None is dropless.
        dispatcher: of ours, which runs their experts; None leaves them to transformers.

    Returns:
        The layers by their path in the model.

    Raises:
        UserError: the model has no mixture that can be adopted, or one that cannot, or experts that the dispatcher
            cannot run.
    """
    if router is not None and bias_rate is not None:
        raise UserError(
            "model.backbone.bias_rate moves the bias of the model's own routers, and model.backbone.router replaces "
            "them: set one of them to null; SigmoidBiasRouter has an update_rate"
        )
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
            "Qwen3-VL-MoE or OLMoE, or set model.backbone.upcycle to make experts of its feed-forwards"
        )
    layers: dict[str, AdoptedMoE] = {}
    for seam in seams:
        block = model.get_submodule(seam.path)
        theirs, experts = getattr(block, seam.name), block.experts
        assert isinstance(theirs, nn.Module) and isinstance(experts, nn.Module)
        replacement = None if router is None else replace_router(theirs, seam, block, router)
        layer = AdoptedMoE(
            theirs,
            seam.gate,
            experts,
            current,
            seam.modality,
            replacement,
            bias_rate,
            capacity,
            copy.deepcopy(dispatcher),  # it remembers the cases of its layer
        )
        if replacement is not None:
            layer.replaced = (theirs,)
            if replacement.carries:
                carry(theirs, replacement.router)
        layer.train(theirs.training)
        setattr(block, seam.name, layer)
        layers[f"{seam.path}.{seam.name}" if seam.path else seam.name] = layer
    if dispatcher is not None:
        take_over(model, layers)
    return layers


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Put their routers where our layers stand while the block runs: the model is as transformers built it.

    Afterwards routers of ours that carry their weights take them anew.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, AdoptedMoE)}
    for path, layer in layers.items():
        model.set_submodule(path, layer.theirs)
    try:
        yield
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)
            if layer.replaced and getattr(layer.router, "keeps_weights", False):
                carry(layer.replaced[0], layer.router)
