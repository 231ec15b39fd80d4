"""Runs a model over a probe, and yields the experts of every token with its labels.

Nothing is masked, dropped or noisy. Pairs are encoded together, without attention between image and text if the
objective never lets them attend to each other, and apart if it has no pass over pairs. Every sample has one row of
positions, patches first, then text, whichever pass encoded them. Of a statement about two images the left one is seen.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.atlas.labels.label_tokens import LabelReader, TokenLabels
from lightning_moevlm.atlas.probe.probe_set import ProbeBatch, ProbeSet
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingPlan
from lightning_moevlm.contracts.step_records import NamedPlan
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.objectives import Joint, Objective


class LayerChoices(NamedTuple):
    """The experts of a batch's tokens in one layer, on the CPU; zeros where the layer saw no token.

    layer: path of the layer in the backbone.
    block: index of its block.
    seen_BS: bool, valid tokens that the router saw.
    chosen_BSE: fp32, 1 for each expert that a token chose; of soft slots the share of each expert.
    weight_BSE: fp32, combine weights of the chosen experts.
    probs_BSE: fp32, the router's probabilities.
    """

    layer: str
    block: int
    seen_BS: Tensor
    chosen_BSE: Tensor
    weight_BSE: Tensor
    probs_BSE: Tensor


class RoutedBatch(NamedTuple):
    """A batch of a probe with its labels and choices."""

    probe: ProbeBatch
    labels: TokenLabels
    layers: tuple[LayerChoices, ...]
    """In the order of the model."""


def route(
    backbone: Backbone, objective: Objective, probe: ProbeSet, reader: LabelReader, batch_size: int = 32
) -> Iterator[RoutedBatch]:
    """Yield all batches of a probe; the model is used as it is, in evaluation mode.

    Args:
        backbone: the model.
        objective: of its training; decides which passes it knows.
        probe: the samples.
        reader: labels them.
        batch_size: samples of a forward pass.

    Raises:
        UserError: the model has no layer with experts.
    """
    device = next(backbone.parameters()).device
    was_training = backbone.training
    backbone.eval()
    try:
        for each in probe.batches(batch_size):
            moved = move_batch(each.batch, device)
            plans = encode(backbone, objective, moved)
            if not plans:
                raise UserError(
                    "no layer of this model has experts for the samples of the probe: choose a sparse model, or data "
                    "of the modality whose feed-forwards are sparse"
                )
            yield RoutedBatch(each, reader(each), choices_of(plans, reader, moved))
    finally:
        backbone.train(was_training)


class PlacedPlan(NamedTuple):
    """A plan and the samples that it is of."""

    plan: NamedPlan
    rows: range
    """Samples of the batch."""


@torch.no_grad()
def encode(backbone: Backbone, objective: Objective, batch: Batch) -> list[PlacedPlan]:
    """Run the passes that the model knows over a batch of one source; return their plans."""
    passes = _passes(objective, batch)
    pairs, num_images = batch.pairs, len(batch.image_keys)
    placed: list[PlacedPlan] = []
    if pairs and "pair" in passes:
        output = backbone(*batch.first(pairs)[:3], separate=keeps_apart(objective))
        return [PlacedPlan(plan, range(pairs)) for plan in output.plans]
    if num_images and "image" in passes:
        placed += [PlacedPlan(plan, range(num_images)) for plan in backbone(batch.images_BRYX).plans]
    if batch.text_BL is not None and "text" in passes:
        rows = range(batch.num_samples - len(batch.text_BL), batch.num_samples)
        placed += [PlacedPlan(plan, rows) for plan in backbone(None, batch.text_BL, batch.text_mask_BL).plans]
    return placed


def keeps_apart(objective: Objective) -> bool:
    """Return whether the objective never lets image and text of a pair attend to each other."""
    if isinstance(objective, Joint):
        parts = [part for part in objective.parts.values() if isinstance(part, Objective)]
        return all(keeps_apart(part) for part in parts)
    return "pair" in objective.separate_passes


def choices_of(plans: Sequence[PlacedPlan], reader: LabelReader, batch: Batch) -> tuple[LayerChoices, ...]:
    """Return the choices of each layer; plans of one layer in several passes are of different tokens."""
    patches, shape = reader.grid**2, (batch.num_samples, reader.length)
    found: dict[str, LayerChoices] = {}
    for named, rows in plans:
        columns = _columns(named, len(rows), patches)
        plan = named.plan
        if named.layer not in found:
            empty = torch.zeros(*shape, plan.num_experts, dtype=torch.float32)
            seen_BS = torch.zeros(shape, dtype=torch.bool)
            found[named.layer] = LayerChoices(named.layer, named.block, seen_BS, empty, empty.clone(), empty.clone())
        into = found[named.layer]
        place = (slice(rows.start, rows.stop), columns)
        for values, target in zip(_dense(plan), into[2:], strict=True):
            target[place] = values.view(len(rows), -1, *values.shape[1:]).to("cpu", target.dtype)
    return tuple(sorted(found.values(), key=lambda each: (each.block, each.layer)))


def _dense(plan: RoutingPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return seen (T,), chosen, weight and probs (T, E) of a plan."""
    valid_T1 = plan.valid_T.unsqueeze(-1)
    if not isinstance(plan, PairPlan):
        share_TE = plan.probs_TE * valid_T1
        return plan.valid_T, share_TE, share_TE, share_TE
    pair_N = plan.token_N * plan.num_experts + plan.expert_N
    flat = torch.zeros(plan.num_tokens * plan.num_experts, dtype=torch.float32, device=pair_N.device)
    chosen = flat.index_add(0, pair_N, plan.chosen_N.float()).clamp(max=1)
    weight = flat.index_add(0, pair_N, torch.where(plan.chosen_N, plan.weight_N.float(), 0.0))
    shape = (plan.num_tokens, plan.num_experts)
    return plan.valid_T, chosen.view(shape), weight.view(shape), plan.probs_TE.float() * valid_T1


def _columns(named: NamedPlan, num_rows: int, patches: int) -> slice:
    """Return the positions of a plan's tokens in the rows of the probe."""
    per_row = named.plan.num_tokens // num_rows
    modalities = {Modality(kind) for kind in named.plan.modality_T.unique().tolist()}
    if modalities == {Modality.TEXT}:
        return slice(patches, patches + per_row)
    if modalities == {Modality.IMAGE} and per_row != patches:
        raise UserError(
            f"{named.layer} routes {per_row} tokens of an image, which the model cuts into {patches} patches: where "
            "they lie in the image is not known, so their experts cannot be shown"
        )
    return slice(0, per_row)


def _passes(objective: Objective, batch: Batch) -> set[str]:
    """Return the kinds of passes that an objective has: pair, image, text."""
    size = objective.size(batch)
    if size is None:
        return {"pair", "image", "text"}
    return {source.rpartition("/")[2] for source in size.passes}


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Return a batch whose images and texts are on a device."""
    images, second = batch.images_BRYX, batch.second_images_BRYX
    return batch._replace(
        images_BRYX=None if images is None else images.to(device),
        text_BL=None if batch.text_BL is None else batch.text_BL.to(device),
        text_mask_BL=None if batch.text_mask_BL is None else batch.text_mask_BL.to(device),
        second_images_BRYX=None if second is None else second.to(device),
    )
