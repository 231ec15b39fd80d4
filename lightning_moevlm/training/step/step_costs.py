"""Computes what a training step costs before it runs: parameters, active FLOPs by part, memory of activations.

    FLOPs        of the objective's own passes over image-text pairs of full length, as `Backbone.costs` and
                 `Objective.costs` count them; `match` and `budget` of studies use one pass over a pair, counted alike
    activations  numbers kept for the backward pass x bytes of their dtype, of one micro-batch on one rank

Kept of each token and block, with pre-norms: 2 D inputs of norms; 5 D + S of attention over S tokens (its input, query,
key, value, the heads' outputs, the mask), 9 D + S with qk-norm; D + 2 F of a dense feed-forward of hidden width F. An
expert's row keeps 2 D + 2 F, for every expert that a token visits. A predicted word keeps 2 V in the head. Mixed
precision also keeps a copy of every weight in the low precision. Dropout, buffers of dispatchers and temporary tensors
are not counted. Tests hold the sum against what autograd keeps of quickstart: within 15 %.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.model_card import Costs, ModelCard
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.special_tokens import BOS, EOS, SPECIAL_TOKENS
from lightning_moevlm.model.backbones import Backbone, BackboneSpec, model_card, pair_costs
from lightning_moevlm.model.layers import count_parameters
from lightning_moevlm.model.objectives import Objective

_BYTES = {"64": 8, "32": 4, "bf16": 2, "16": 2}
_WHOLE = "forward"
_MEANINGS = {
    _WHOLE: "the objective's passes and heads",
    "embeddings": "projection of patches",
    "attention": "projections, scores and values",
    "router": "scores of experts",
    "experts": "those that run, shared ones too",
    "feed_forward": "dense feed-forwards",
    "heads": "of the objective",
}
_INPUTS = {"image": (Modality.IMAGE,), "text": (Modality.TEXT,), "pair": (Modality.IMAGE, Modality.TEXT)}


@dataclass(frozen=True)
class StepCosts:
    """Costs of a model and of its training step."""

    card: ModelCard
    head_parameters: int  # of the objective
    active_parameters: dict[str, int]  # of the backbone, by kind of sample: image, text, pair
    batch_size: int  # pairs in a micro-batch of one rank
    pair: Costs  # one pass of the backbone over a pair
    pair_tokens: int
    step: Costs | None  # the objective's passes over a micro-batch; None: it does not know them
    step_tokens: int  # token positions of these passes
    activation_bytes: int | None  # kept for the backward pass of a micro-batch


def compute_step_costs(
    backbone: Backbone, objective: Objective, batch_size: int, precision: str = "32-true"
) -> StepCosts:
    """Count what a model costs; its weights may lie on "meta".

    Args:
        backbone: the model.
        objective: what trains it.
        batch_size: pairs in a micro-batch of one rank.
        precision: as the Trainer takes it.
    """
    spec = backbone.spec
    batch = full_batch(spec, batch_size)
    step, size = objective.costs(backbone, batch), objective.size(batch)
    return StepCosts(
        model_card(backbone),
        count_parameters(objective),
        {name: round(backbone.active_parameters(modalities)) for name, modalities in _INPUTS.items()},
        batch_size,
        pair_costs(backbone),
        spec.num_patches + spec.max_text_len,
        step,
        0 if size is None else sum(int(one.tokens_A.sum()) for one in size.passes.values()),
        None if step is None else activation_bytes(step, precision, count_parameters(backbone)),
    )


class CostRow(NamedTuple):
    """One cost for people."""

    cost: str
    value: float | None  # None: unknown
    per_token: float | None
    unit: str  # of the value
    meaning: str


def list_costs(costs: StepCosts) -> list[CostRow]:
    """Return every cost, in the order in which they are read."""
    card, step, num_pairs, num_tokens = costs.card, costs.step, costs.batch_size, costs.step_tokens
    rows = [
        CostRow("parameters", card.total_parameters, None, "parameters", "of the backbone"),
        CostRow("active parameters", card.active_parameters, None, "parameters", "without experts that a token skips"),
        *(
            CostRow(f"active parameters, {name}", number, None, "parameters", f"that work on one {name}")
            for name, number in costs.active_parameters.items()
        ),
        CostRow("head parameters", costs.head_parameters, None, "parameters", "of the objective"),
    ]
    for name, meaning in _MEANINGS.items():
        flops = None if step is None else step.by_part().get(name, step.flops)
        per_sample, per_token = (None, None) if flops is None else (flops / num_pairs, flops / num_tokens)
        words = name if name == _WHOLE else f"{_WHOLE}, {name}"
        rows.append(CostRow(words, per_sample, per_token, "FLOP/sample", meaning))
    pair = costs.pair.flops
    compared = "of the backbone, compared by match: active_flops"
    rows.append(CostRow("one pass over a pair", pair, pair / costs.pair_tokens, "FLOP/sample", compared))
    rows.append(CostRow("activations", costs.activation_bytes, None, "bytes", f"kept for {num_pairs} pairs"))
    return rows


def activation_bytes(costs: Costs, precision: str, num_parameters: int) -> int:
    """Return the bytes that the backward pass needs beside the weights.

    Args:
        costs: of one micro-batch.
        precision: as the Trainer takes it; what `model.precision` pins otherwise is not looked at.
        num_parameters: of the model.
    """
    name, _, kind = precision.partition("-")
    products = _BYTES.get(name, 4)
    is_mixed = kind == "mixed"
    norms = max(products, 4) if is_mixed else products
    copies = products * num_parameters if is_mixed else 0
    return round(norms * costs.kept_by_norms + products * costs.kept_by_products) + copies


def full_batch(spec: BackboneSpec, num_pairs: int) -> Batch:
    """Return pairs whose texts are as long as they may be; images have no pixels."""
    text_BL = torch.full((num_pairs, spec.max_text_len), len(SPECIAL_TOKENS), device="cpu")
    text_BL[:, 0] = BOS
    text_BL[:, -1] = EOS
    images_BRYX = torch.empty(num_pairs, 3, spec.image_size, spec.image_size, dtype=torch.uint8, device="meta")
    keys = tuple(map(str, range(num_pairs)))
    return Batch(images_BRYX, text_BL, torch.ones_like(text_BL, dtype=torch.bool), keys)
