"""Proof of a switch of the initial weights.

    depth, init_scheme, init_scale   the measured standard deviation of a matrix is that of the blocks' scheme with the
                                     switch, not the one without it (model/layers/init_scheme.py)
    upcycle                          mixtures were compared with the dense feed-forwards that they were made of

Only a fresh model can be asked, because training moves the weights.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lightning_moevlm.model.initial_weights import InitialScale, initial_scales
from lightning_moevlm.model.layers import Block, ModelStabilisers, MoEFFN
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt, Switch
from lightning_moevlm.training.callbacks.liveness.trunk_proofs import stabilisers_of

_CUT_AT_TWO = 0.87963  # standard deviation of a standard normal cut at two: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1))


def init_receipts(module: VisionLanguageModule, is_fresh: bool) -> list[Receipt]:
    """Return the receipts of the switches of initial weights; empty once training has moved them."""
    switches = stabilisers_of(module)
    if switches is None or not is_fresh:
        return []
    plain = ModelStabilisers()
    off: dict[str, ModelStabilisers] = {}
    if switches.residual_scaling == "depth":
        off["residual_scaling"] = replace(switches, residual_scaling=None)
    if switches.init_scheme != plain.init_scheme:
        off["init_scheme"] = replace(switches, init_scheme=plain.init_scheme)
    if switches.init_scale != plain.init_scale:
        off["init_scale"] = replace(switches, init_scale=plain.init_scale)
    return [_receipt(module, Switch(f"stabilisers.{name}", "trunk"), other) for name, other in off.items()]


def upcycling_receipts(module: VisionLanguageModule, is_fresh: bool) -> list[Receipt]:
    """Return the receipt of upcycling: the largest difference to a dense start; empty once training has moved it."""
    layers = [layer for layer in module.modules() if isinstance(layer, MoEFFN)]
    found = [layer.start_difference for layer in layers if layer.start_difference is not None]
    if not found or not is_fresh:
        return []
    switch, worst = Switch("upcycle", "trunk"), max(found, key=lambda each: (math.isnan(each), each))
    evidence = (
        f"{len(found)} of {len(layers)} mixtures differ from their dense start by at most {worst:.2g} of its output"
    )
    return [switch.is_("alive" if math.isfinite(worst) else "unproven", evidence, worst)]


def _receipt(module: VisionLanguageModule, switch: Switch, off: ModelStabilisers) -> Receipt:
    """Compare on the matrix that the switch moves most."""
    wanted, without = _scales(module, None), _scales(module, off)
    measured = {
        path: float(parameter.detach().float().std(correction=0))
        for path, parameter in module.named_parameters()
        if path in wanted and wanted[path].std > 0 and without[path].std > 0 and wanted[path].value_factor == 1.0
    }
    ratios = {path: _effective(wanted[path]) / _effective(without[path]) for path in measured}
    path = max(ratios, key=lambda one: abs(math.log(ratios[one])), default=None)
    if path is None or abs(math.log(ratios[path])) < 1e-3:
        return switch.is_("idle", "at this size every matrix starts as it would without it")
    std, with_it, without_it = measured[path], _effective(wanted[path]), _effective(without[path])
    evidence = f"{path} starts with std {std:.3g}; {with_it:.3g} with it, {without_it:.3g} without"
    if abs(math.log(std / with_it)) < abs(math.log(std / without_it)):
        return switch.is_("alive", evidence, std)
    advice = f"draw the matrices of blocks by `initialise`, or turn model.backbone.init_args.{switch.name} off"
    return switch.dead(evidence, advice, std)


def _scales(module: VisionLanguageModule, switches: ModelStabilisers | None) -> Mapping[str, InitialScale]:
    """Return the initial scale of each matrix of a block, with the model's own switches or with others."""
    blocks = [layer for layer in module.modules() if isinstance(layer, Block)]
    own = [block.stabilisers for block in blocks]
    try:
        for block in blocks:
            block.stabilisers = switches or block.stabilisers
        scales = initial_scales(module, module.init_std)
    finally:
        for block, before in zip(blocks, own, strict=True):
            block.stabilisers = before
    owners: dict[str, nn.Module] = dict(module.named_modules())
    # a module with a scale of its own is not drawn by the scheme
    return {
        path: scale
        for path, scale in scales.items()
        if getattr(owners[path.rpartition(".")[0]], "initial_std", None) is None
        and getattr(getattr(owners[path.rpartition(".")[0]], "init", None), "scale", None) is None
    }


def _effective(scale: InitialScale) -> float:
    return scale.std * (1.0 if math.isinf(scale.cut) else _CUT_AT_TWO)
