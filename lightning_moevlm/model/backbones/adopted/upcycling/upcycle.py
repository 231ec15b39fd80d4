"""Puts mixtures of ours where a transformers model has dense feed-forwards (sparse upcycling, arXiv 2212.05055)."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.model.backbones.adopted.routing.current_pass import CurrentPass
from lightning_moevlm.model.backbones.adopted.routing.seam import find_seams
from lightning_moevlm.model.backbones.adopted.trained_parts import LoRA
from lightning_moevlm.model.backbones.adopted.upcycling._upcycled_moe import UpcycledMoE
from lightning_moevlm.model.backbones.adopted.upcycling.dense import find_feed_forwards
from lightning_moevlm.model.backbones.placement import Placement, place_experts
from lightning_moevlm.model.dispatch import Capacity, Dispatcher
from lightning_moevlm.model.experts.upcycle import Upcycle
from lightning_moevlm.model.routers import Router, TopKRouter


@dataclass(frozen=True)
class UpcycleDense(Upcycle):
    """Mixtures made of the dense feed-forwards of a model.

    Args:
        noise: standard deviation of what is added to each expert, over that of the dense matrix; 0 leaves copies alike
            until routing tells them apart.
        reinitialised: share of each expert's hidden units that start anew (Drop-Upcycling uses 0.5).
        seed: of both.
        num_experts: E of each mixture, slices counted one by one.
        top_k: experts per token of a TopKRouter with renormalised weights; null takes 2 copies, or is that of
            `model.backbone.router`.
        granularity: G: slices of F / G hidden units stand for each copy of a feed-forward; 1 takes it whole.
        moe_every: every n-th block gets a mixture.
        moe_placement: which blocks; null follows `moe_every`.

    Raises:
        UserError: a number out of range.
    """

    num_experts: int = 8
    top_k: int | None = None
    granularity: int = 1
    moe_every: int = 1
    moe_placement: Placement = None

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        check_number("upcycle.num_experts", self.num_experts, least=1)
        check_number("upcycle.granularity", self.granularity, least=1)


def upcycle_dense(
    model: Any,
    current: CurrentPass,
    options: UpcycleDense,
    router: Callable[[int, int], Router] | None,
    bias_rate: float | None,
    lora: LoRA | None = None,
    capacity: Capacity | None = None,
    dispatcher: Dispatcher | None = None,
) -> dict[str, UpcycledMoE]:
    """Replace the feed-forwards of a model in some of its blocks, in place.

    Args:
        model: of transformers.
        current: the pass that its layers will run in.
        options: which of them, and how experts start.
        router: factory (dim, num_experts) -> Router; None is TopKRouter.
        bias_rate: must be None; it moves a bias that upcycled models do not have.
        lora: adapters that will be added.
        capacity: of experts; None is dropless.
        dispatcher: None is AutoDispatcher.

    Returns:
        The mixtures by their path in the model.

    Raises:
        UserError: the model is a mixture already, or none of its modules is a feed-forward that is known here.
    """
    name = type(model).__name__
    seams, refusals = find_seams(model)
    if seams or refusals:
        raise UserError(f"{name} has experts already: set model.backbone.upcycle to null, or name a dense model")
    if bias_rate is not None:
        raise UserError(
            "model.backbone.bias_rate moves the bias of the model's own routers, and an upcycled model has none: set "
            "it to null, and model.backbone.router to SigmoidBiasRouter"
        )
    if lora is not None and not lora.train_experts:
        raise UserError(
            "model.backbone.lora freezes the experts, and those of an upcycled model start as copies of each other and "
            "would stay alike: set lora.train_experts to true, or lora to null"
        )
    if router is not None and options.top_k is not None:
        raise UserError(
            "model.backbone.upcycle.top_k is that of a TopKRouter, and model.backbone.router is another with a top_k "
            "of its own: set one of them to null"
        )
    if router is None:
        top_k = 2 * options.granularity if options.top_k is None else options.top_k
        if not 1 <= top_k <= options.num_experts:
            raise UserError(
                f"model.backbone.upcycle.num_experts is {options.num_experts}, and upcycle.top_k {top_k}"
                f"{' (null takes 2 copies)' if options.top_k is None else ''}: choose top_k from 1 to num_experts"
            )
        router = partial(TopKRouter, top_k=top_k, renormalise=top_k > 1)
    found, reasons = find_feed_forwards(model)
    if not found:
        why = f": {reasons[0]}" if reasons else ""
        raise UserError(f"{name} has no dense feed-forward that can be upcycled{why}; name another model")
    blocks = sorted({dense.block for dense in found})
    chosen = {blocks[place] for place in place_experts(len(blocks), options.moe_every, options.moe_placement)}
    layers: dict[str, UpcycledMoE] = {}
    for dense in found:
        if dense.block in chosen:
            theirs = model.get_submodule(dense.path)
            layer = UpcycledMoE(
                dense,
                theirs,
                current,
                options.num_experts,
                options.granularity,
                router,
                options,
                capacity,
                copy.deepcopy(dispatcher),  # it remembers the cases of its layer
            )
            layer.train(theirs.training)
            model.set_submodule(dense.path, layer)
            layers[dense.path] = layer
    return layers


@contextmanager
def dense_again(model: nn.Module) -> Iterator[None]:
    """Put feed-forwards back while the block runs."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, UpcycledMoE) and layer.replaced}
    for path, layer in layers.items():
        model.set_submodule(path, layer.replaced[0])
    try:
        yield
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)
