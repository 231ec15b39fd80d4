"""Proof of a trunk switch: without it, its layers give other outputs for the same tokens.

Each layer runs again on its inputs of the rehearsal, as it is and with the part taken out. The evidence is the
difference (root mean square over that of the output). A part that is there but unused makes no difference: the switch
is dead. Every layer that ran must differ.

    qk_norm            attention without the norm of queries, or of keys
    attention_gate     attention without the gate
    logit_cap          attention with the cap, and with one that no logit reaches; within rounding the switch is idle,
                       if a cap far below the logits makes a difference
    sub_norm           attention and feed-forwards without the norm inside
    norm               blocks, attention and feed-forwards with a LayerNorm in place of each norm
    norm_placement     blocks without one of their norms
    layer_scale        blocks without the factors
    residual_scaling   deepnorm: blocks with the residual at weight 1; depth: see init_proofs.py
    glu                feed-forwards with the bound of their gated units, and with none; within rounding the switch is
                       idle, if a tiny bound makes a difference
    freeze_patches     the projection takes no step, though the loss has a gradient at its output
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

from torch import Tensor, nn

from lightning_moevlm.model.experts import GLU, ClampedGLU
from lightning_moevlm.model.layers import (
    Attention,
    Block,
    DenseFFN,
    Mixture,
    ModelStabilisers,
    PatchEmbedding,
    gated_parts,
)
from lightning_moevlm.training.callbacks.liveness.loss_proofs import norm_of
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt, Switch
from lightning_moevlm.training.callbacks.liveness.rehearsal import (
    Rehearsal,
    difference,
    gradients_of,
    replace_attribute,
)

_NO_CAP = 1e4  # times the cap: tanh is the identity there up to rounding
_TINY_CAP = 1e-3  # times the largest logit
_TINY_UNIT = ClampedGLU(1e-9)
_ROUNDING = 1e-6  # of fp32 sums in another order


class _Part(NamedTuple):
    """A part of the layer at `path`, and its replacement without the switch."""

    path: str
    attribute: str
    neutral: object


def trunk_receipts(rehearsal: Rehearsal) -> list[Receipt]:
    """Return the receipts of the model's stabilisers that act in forward passes."""
    layers = dict(rehearsal.module.named_modules())
    switches = stabilisers_of(rehearsal.module)
    if switches is None:
        return []
    moves_norms, has_alpha = switches.norm_placement != "pre", switches.residual_scaling == "deepnorm"
    asked = (
        (switches.qk_norm, "qk_norm", _qk_norms(layers)),
        (switches.attention_gate is not None, "attention_gate", _gates(layers)),
        (switches.sub_norm, "sub_norm", _sub_norms(layers)),
        (switches.norm != "layer", "norm", _other_norms(layers)),
        (moves_norms, "norm_placement", _block_norms(layers)),
        (switches.layer_scale is not None, "layer_scale", _scales(layers)),
        (has_alpha, "residual_scaling", _residuals(layers)),
    )
    receipts = [_by_removal(rehearsal, _switch(name), parts) for is_on, name, parts in asked if is_on]
    if switches.logit_cap is not None:
        receipts.append(_logit_cap(rehearsal, layers))
    if switches.glu is not None:
        receipts.append(_glu(rehearsal, layers, switches.glu))
    if switches.freeze_patches:
        receipts.append(_frozen_patches(rehearsal, layers))
    return receipts


def stabilisers_of(module: nn.Module) -> ModelStabilisers | None:
    """Return the switches that the model's blocks were built with; None for a model without such blocks."""
    return next((layer.stabilisers for layer in module.modules() if isinstance(layer, Block)), None)


def _switch(name: str) -> Switch:
    return Switch(f"stabilisers.{name}", "trunk")


def _by_removal(rehearsal: Rehearsal, switch: Switch, parts: Iterable[_Part]) -> Receipt:
    parts = [part for part in parts if part.path in rehearsal.calls]
    if not parts:
        return switch.is_("unproven", "no layer with it ran on this batch")
    least = float("inf")
    for path, attribute, neutral in parts:
        own = getattr(rehearsal.module.get_submodule(path), attribute)
        changed = rehearsal.compare(path, attribute, own, neutral)
        if changed != changed:
            return switch.is_("unproven", "a layer's output is not finite at this step")
        if not changed > 0:
            return switch.dead(
                f"{path} gives the same without its {attribute}: the part is there and its output is not used",
                f"let the layer use it, or turn model.backbone.init_args.{switch.name} off",
                0.0,
            )
        least = min(least, changed)
    places = len({part.path for part in parts})
    return switch.is_(
        "alive", f"without it the output of each of {places} layers changes by {least:.2g} of its size or more", least
    )


def _logit_cap(rehearsal: Rehearsal, layers: dict[str, nn.Module]) -> Receipt:
    switch, moved, tiny = _switch("logit_cap"), 0.0, []
    largest = max((float(seen.max_H.max()) for seen in rehearsal.output.attention), default=0.0)
    paths = [path for path, layer in layers.items() if isinstance(layer, Attention) and path in rehearsal.calls]
    if not paths:
        return switch.is_("unproven", "no attention ran on this batch")
    for path in paths:
        layer = layers[path]
        assert isinstance(layer, Attention) and layer.logit_cap is not None
        no_cap = layer.logit_cap * _NO_CAP
        tiny.append(rehearsal.compare(path, "logit_cap", no_cap, max(abs(largest), 1e-3) * _TINY_CAP))
        moved = max(moved, rehearsal.compare(path, "logit_cap", no_cap, layer.logit_cap))
    if not min(tiny) > 0:
        return switch.dead(
            f"{paths[tiny.index(min(tiny))]} gives the same under a cap of {_TINY_CAP:g} times its largest logit",
            "let the layer use its logit_cap, or set model.backbone.init_args.stabilisers.logit_cap to null",
            0.0,
        )
    evidence = f"largest attention logit {largest:.3g}; the cap changes attention by {moved:.2g} of it"
    return switch.is_("alive" if moved > _ROUNDING else "idle", evidence, moved)


def _glu(rehearsal: Rehearsal, layers: dict[str, nn.Module], glu: GLU) -> Receipt:
    switch, moved = _switch("glu"), 0.0
    found = {path: layer for path, layer in _of(layers, DenseFFN, Mixture) if gated_parts(layer)}
    num_ran = 0
    for path, layer in found.items():
        if path not in rehearsal.calls:
            continue
        bounded, plain, tiny = (_with_unit(rehearsal, path, layer, unit) for unit in (glu, None, _TINY_UNIT))
        if not bool(bounded.any()):
            continue  # nothing comes out of it yet, whatever its units do
        num_ran += 1
        if not difference(bounded, tiny) > 0:
            return switch.dead(
                f"{path} gives the same under a bound of {_TINY_UNIT.limit:g}",
                f"let its gated units use their glu, or set model.backbone.init_args.{switch.name} to null",
                0.0,
            )
        moved = max(moved, difference(bounded, plain) if bool(plain.isfinite().all()) else math.inf)
    if not num_ran:
        return switch.is_("unproven", "no gated feed-forward gave an output on this batch")
    evidence = f"without it the output of {num_ran} feed-forwards changes by up to {moved:.2g} of its size"
    return switch.is_("alive" if moved > _ROUNDING else "idle", evidence, moved)


def _with_unit(rehearsal: Rehearsal, path: str, layer: nn.Module, glu: GLU) -> Tensor:
    with ExitStack() as stack:
        for part in gated_parts(layer):
            stack.enter_context(replace_attribute(part, "glu", glu))
        tokens_BSD: Tensor = rehearsal.layer(path).tokens_BSD
        return tokens_BSD


def _frozen_patches(rehearsal: Rehearsal, layers: dict[str, nn.Module]) -> Receipt:
    switch = _switch("freeze_patches")
    embeddings = [(path, layer) for path, layer in layers.items() if isinstance(layer, PatchEmbedding)]
    calls = [rehearsal.calls[path] for path, _ in embeddings if path in rehearsal.calls]
    if not calls:
        return switch.is_("unproven", "no image in these samples")
    loose = sum(p.requires_grad for _, layer in embeddings for p in layer.project.parameters())
    if loose:
        return switch.dead(
            f"{loose} tensors of the patch projection take gradients",
            f"leave requires_grad of the projection off, or turn model.backbone.init_args.{switch.name} off",
        )
    size = norm_of(gradients_of(rehearsal.report.total_loss, [call.output for call in calls]))
    return switch.is_("alive", f"a gradient of norm {size:.2g} at the patches goes no further", size)


def _qk_norms(layers: dict[str, nn.Module]) -> Iterator[_Part]:
    for path, _ in _of(layers, Attention):
        yield from (_Part(path, name, None) for name in ("query_norm", "key_norm"))


def _gates(layers: dict[str, nn.Module]) -> Iterator[_Part]:
    yield from (_Part(path, "gate", None) for path, _ in _of(layers, Attention))


def _sub_norms(layers: dict[str, nn.Module]) -> Iterator[_Part]:
    yield from (_Part(path, "out_norm", None) for path, _ in _of(layers, Attention))
    yield from (_Part(path, "hidden_norm", None) for path, _ in _of(layers, DenseFFN, Mixture))


def _block_norms(layers: dict[str, nn.Module]) -> Iterator[_Part]:
    names = ("attention_norm", "attention_out_norm", "ffn_norm", "ffn_out_norm")
    for path, block in _of(layers, Block):
        yield from (_Part(path, name, None) for name in names if getattr(block, name) is not None)


def _other_norms(layers: dict[str, nn.Module]) -> Iterator[_Part]:
    for part in (*_block_norms(layers), *_sub_norms(layers)):
        norm = getattr(layers[part.path], part.attribute)
        if norm is not None:
            beside = next(layers[part.path].parameters())
            plain = nn.LayerNorm(norm.normalized_shape, device=beside.device, dtype=beside.dtype)
            yield part._replace(neutral=plain)


def _scales(layers: dict[str, nn.Module]) -> Iterator[_Part]:
    for path, _ in _of(layers, Block):
        yield from (_Part(path, name, None) for name in ("attention_scale", "ffn_scale"))


def _residuals(layers: dict[str, nn.Module]) -> Iterator[_Part]:
    yield from (_Part(path, "residual_weight", 1.0) for path, _ in _of(layers, Block))


def _of(layers: dict[str, nn.Module], *kinds: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    return ((path, layer) for path, layer in layers.items() if isinstance(layer, kinds))
