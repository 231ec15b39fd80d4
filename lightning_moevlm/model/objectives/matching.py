"""Image-text matching with hard negatives: do an image and a text belong together (ALBEF, arXiv 2107.07651, 3.2)?

    negative text of image i    drawn from the other texts j of the batch with probability ~ exp(s <image i, text j>)
    negative image of text i    likewise
    loss                        binary cross-entropy of a linear head on image i with its own text, image i with its
                                negative text, and text i with its negative image; mean over the decisions

The similarities are those of a contrast of the same batch, which is trained beside it. Both modalities see each other
in the pass of the head. Texts or images that equal the sample's own are no negatives. Negatives are drawn by the
sample's key and the step, from the micro-batch of one rank.

Evaluation takes the same pairs of the set at any batch size: those whose keys have the smallest hashes. Their negatives
are drawn among all of them. Every caption of an image is a pair of it there.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.step_records import (
    BatchSize,
    Embeddings,
    Matchable,
    NamedPlan,
    ObjectiveOutput,
    PlanSize,
    Term,
)
from lightning_moevlm.model.backbones import Backbone, BackboneOutput, BackboneSpec
from lightning_moevlm.model.metrics.measure import Measure
from lightning_moevlm.model.metrics.tasks.matching import MatchingScores
from lightning_moevlm.model.objectives.contrastive import TERM as CONTRASTIVE
from lightning_moevlm.model.objectives.contrastive import Contrastive
from lightning_moevlm.model.objectives.draws import Draws
from lightning_moevlm.model.objectives.objective import Objective
from lightning_moevlm.model.precision import region

TERM = "matching"
_CONTRAST, _FUSED = "contrastive/pair", "matching/pair"  # sources of the two passes
_HELD_OUT = Draws(0)


class Matching(Objective):
    """Contrasts images and texts, and judges whether they match.

    Args:
        spec: the backbone's dimensions.
        contrast: the contrast that gives the similarities; a factory (spec) -> Contrastive.
        weight: of the matching term in the task loss.
        num_evaluated: pairs that an evaluation judges; they are kept in memory until its end.

    Raises:
        UserError: fewer than 2 pairs to evaluate.
    """

    separate_passes = frozenset({_CONTRAST})

    def __init__(
        self,
        spec: BackboneSpec,
        contrast: Callable[[BackboneSpec], Contrastive] = Contrastive,
        weight: float = 1.0,
        num_evaluated: int = 512,
    ) -> None:
        super().__init__()
        check_number("num_evaluated of Matching", num_evaluated, least=2)
        self.contrast = contrast(spec)
        self.weight = weight
        self.num_evaluated = num_evaluated
        self.head = nn.Linear(spec.dim, 1)
        self.num_classes = {}

    def can_use(self, batch: Batch) -> bool:
        """Return whether a batch holds pairs; while the ranks run the same step, those of all ranks."""
        self.contrast.spans_ranks = self.spans_ranks
        return self.contrast.can_use(batch)

    def forward(self, backbone: Backbone, batch: Batch, draws: Draws) -> ObjectiveOutput:
        """Contrast the pairs; in training, match them with each other."""
        if not self.can_use(batch):
            raise UserError(
                "Matching needs images with their texts, and this batch has none: choose a set of pairs, or "
                "MaskedModelling for images or texts alone"
            )
        pairs = batch.first(batch.pairs)
        contrast = self.contrast.compare(backbone, pairs)
        output = contrast.output._replace(plans=_named(_CONTRAST, contrast.output.plans))
        if not self.training:

            def match(images_BRYX: Tensor, text_BL: Tensor, text_mask_BL: Tensor) -> Tensor:
                device = contrast.image_BD.device
                return self._judge(backbone, images_BRYX.to(device), text_BL.to(device), text_mask_BL.to(device))[1]

            return output._replace(matchable=Matchable(pairs.each_caption(), match))
        with torch.no_grad():
            similar_BB = self._scale() * contrast.image_BD.detach() @ contrast.text_BD.detach().T
            allowed_BB = _differ(pairs)
            text_B, image_B = (
                draw_negatives(each_BB, allowed_BB, draws.uniform(f"negative {name}", pairs.keys, 1)[:, 0])
                for name, each_BB in (("text", similar_BB), ("image", similar_BB.T))
            )
        images_BRYX, own_BL, own_mask_BL = pairs.images_BRYX, pairs.text_BL, pairs.text_mask_BL
        assert images_BRYX is not None and own_BL is not None and own_mask_BL is not None
        fused, logits_3B = self._judge(
            backbone,
            torch.cat([images_BRYX, images_BRYX, images_BRYX[image_B]]),
            torch.cat([own_BL, own_BL[text_B], own_BL]),
            torch.cat([own_mask_BL, own_mask_BL[text_B], own_mask_BL]),
        )
        has_negative_B = allowed_BB.any(dim=1)
        with region(self.precision, "losses", logits_3B.device.type) as cast:
            loss = matching_loss(cast(logits_3B).view(3, -1), has_negative_B)
        return output._replace(
            terms={**output.terms, TERM: Term(loss, self.weight, len(has_negative_B))},
            plans=(*output.plans, *_named(_FUSED, fused.plans)),
            num_tokens=output.num_tokens + fused.num_tokens,
            attention=(*output.attention, *fused.attention),
        )

    def size(self, batch: Batch) -> BatchSize:
        """Return the number of pairs, and tokens of both passes; negative texts count as long as the batch's own."""
        pairs, contrast = batch.first(batch.pairs), self.contrast.size(batch)
        number, mask_BL = contrast.predictions[CONTRASTIVE], pairs.text_mask_BL
        thrice = None if mask_BL is None else mask_BL.repeat(3, 1)
        fused = PlanSize.of_pass(3 * number, thrice, self.contrast.num_patches)
        return BatchSize({CONTRASTIVE: number, TERM: number}, {_CONTRAST: contrast.passes["pair"], _FUSED: fused})

    def head_costs(self, predictions: Mapping[str, int]) -> Costs:
        """2 D FLOPs for each of three decisions about a pair, and those of the contrast."""
        decisions, dim = 3.0 * predictions[TERM], self.head.in_features
        head = Costs(heads=2 * decisions * dim, kept_by_norms=decisions, kept_by_products=decisions * dim)
        return head + self.contrast.head_costs({CONTRASTIVE: predictions[CONTRASTIVE]})

    def measures(self, prefix: str = "", weight: float = 1.0) -> list[Measure]:
        """Add retrieval, and accuracy of matching with the loss over the evaluated pairs."""

        def term(logits_3N: Tensor, has_negative_N: Tensor) -> tuple[str, Term]:
            loss = matching_loss(logits_3N, has_negative_N)
            return prefix + TERM, Term(loss, self.weight * weight, logits_3N.shape[1])

        scores = MatchingScores(self.num_evaluated, self.negatives_of_set, term)
        return [*self.contrast.measures(prefix, weight), scores]

    @torch.no_grad()
    def negatives_of_set(self, embeddings: Embeddings) -> tuple[Tensor, Tensor, Tensor]:
        """Return the row of the negative text and image of each pair, and whether it has any, on the CPU."""
        similar_NN = self._scale().cpu() * embeddings.image_ND @ embeddings.text_ND.T
        images_N, texts_N = _numbered(embeddings.image_ids), _numbered(embeddings.text_ids)
        allowed_NN = (images_N[:, None] != images_N) & (texts_N[:, None] != texts_N)
        text_N, image_N = (
            draw_negatives(each_NN, allowed_NN, _HELD_OUT.uniform(f"negative {name}", embeddings.keys, 1)[:, 0])
            for name, each_NN in (("text", similar_NN), ("image", similar_NN.T))
        )
        return text_N, image_N, allowed_NN.any(dim=1)

    def _scale(self) -> Tensor:
        return self.contrast.log_scale.value.detach().exp()

    def _judge(
        self, backbone: Backbone, images_BRYX: Tensor, text_BL: Tensor, text_mask_BL: Tensor
    ) -> tuple[BackboneOutput, Tensor]:
        """Return the pass, and the logit that each image and text match, (B,)."""
        output = backbone(images_BRYX, text_BL, text_mask_BL)
        with region(self.precision, "heads", output.tokens_BSD.device.type) as cast:
            return output, self.head(cast(output.read_text())).squeeze(1)


def draw_negatives(logits_BN: Tensor, allowed_BN: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw a candidate of each row with probability ~ exp(logit), by one number in [0, 1) each.

    Args:
        logits_BN: any.
        allowed_BN: False where a candidate is no negative; a row without any gets candidate 0.
        uniform_B: on any device.
    """
    probability_BN = logits_BN.float().masked_fill(~allowed_BN, -torch.inf).softmax(dim=1).nan_to_num(0.0)
    bound_BN = probability_BN.cumsum(dim=1)
    place_B = (bound_BN <= uniform_B.to(bound_BN.device, non_blocking=True).unsqueeze(1) * bound_BN[:, -1:]).sum(dim=1)
    last_B = (probability_BN > 0).cumsum(dim=1).argmax(dim=1)  # the last that can be drawn, whatever rounding does
    return torch.minimum(place_B, last_B)


def matching_loss(logits_3B: Tensor, has_negative_B: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of pairs, images with negative texts, and texts with negative images.

    has_negative_B: False leaves the two negatives of a pair out.
    """
    target_3B = torch.zeros_like(logits_3B)
    target_3B[0] = 1.0
    weight_3B = torch.stack([torch.ones_like(has_negative_B), has_negative_B, has_negative_B]).to(logits_3B)
    loss_3B = F.binary_cross_entropy_with_logits(logits_3B, target_3B, reduction="none")
    return ((loss_3B * weight_3B).sum(dim=0) / weight_3B.sum(dim=0)).mean()


def _differ(pairs: Batch) -> Tensor:
    """Return where another pair has another text and another image, (B, B); images of equal colours count as equal."""
    assert pairs.images_BRYX is not None and pairs.text_BL is not None
    text_BL, colour_BR = pairs.text_BL, pairs.images_BRYX.sum(dim=(2, 3), dtype=torch.int64)
    return (text_BL[:, None] != text_BL).any(dim=-1) & (colour_BR[:, None] != colour_BR).any(dim=-1)


def _numbered(ids: Sequence[int]) -> Tensor:
    """Return small numbers that are equal where the ids are."""
    number = {each: index for index, each in enumerate(dict.fromkeys(ids))}
    return torch.tensor([number[each] for each in ids])


def _named(source: str, plans: Sequence[NamedPlan]) -> tuple[NamedPlan, ...]:
    return tuple(plan._replace(source=source) for plan in plans)
