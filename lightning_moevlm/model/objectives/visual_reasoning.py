"""Judges statements about two images, as in NLVR2 (BEiT-3, arXiv 2208.10442, section 3.1).

    feature = [token of (left image, statement), token of (right image, statement)]
    loss    = cross-entropy of a small head on the feature, mean over statements

The token is the first of the statement, or the last in a causal model. Both pairs run in one pass. Neither sees the
other before the head.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Answers, Batch
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.step_records import BatchSize, Judged, ObjectiveOutput, PlanSize, SampleLosses, Term
from lightning_moevlm.model.backbones import Backbone, BackboneSpec
from lightning_moevlm.model.metrics.content_ids import content_ids
from lightning_moevlm.model.metrics.measure import Measure
from lightning_moevlm.model.metrics.tasks.statements import StatementAccuracy
from lightning_moevlm.model.objectives.draws import Draws
from lightning_moevlm.model.objectives.objective import Objective
from lightning_moevlm.model.precision import region

TERM = "statement"
_TRUTH = {"true": 1, "false": 0}


class VisualReasoning(Objective):
    """Judges whether a statement is true of two images.

    Args:
        spec: the backbone's dimensions.
        sees_images: false hides every patch, so that what statements alone give away is measured (a blind model).
    """

    def __init__(self, spec: BackboneSpec, sees_images: bool = True) -> None:
        super().__init__()
        self.sees_images = sees_images
        self.num_patches = spec.num_patches
        self.hidden = nn.Linear(2 * spec.dim, 2 * spec.dim)
        self.norm = nn.LayerNorm(2 * spec.dim)
        self.out = nn.Linear(2 * spec.dim, len(_TRUTH))
        self.num_classes = {}

    def can_use(self, batch: Batch) -> bool:
        """Return whether a batch holds statements about two images, with their truth."""
        return batch.pairs > 0 and batch.answers is not None and batch.second_images_BRYX is not None

    def forward(self, backbone: Backbone, batch: Batch, draws: Draws) -> ObjectiveOutput:
        """Judge the statements of the batch."""
        statements = batch.first(batch.pairs)
        left, right, answers = statements.images_BRYX, statements.second_images_BRYX, statements.answers
        if left is None or right is None or answers is None:
            raise UserError(
                "VisualReasoning needs statements about two images with their truth, and this batch has none: choose "
                "a set of `moevlm data convert statements` or `nlvr2`, and set data.second_image to right and "
                "data.annotation to answers"
            )
        assert statements.text_BL is not None and statements.text_mask_BL is not None
        target_B = self.targets(answers).to(batch.device, non_blocking=True)
        every_BP = torch.ones(2 * len(left), self.num_patches, dtype=torch.bool, device=batch.device)
        output = backbone(
            torch.cat([left, right]),
            statements.text_BL.repeat(2, 1),
            statements.text_mask_BL.repeat(2, 1),
            image_mask_BP=None if self.sees_images else every_BP,
        )
        with region(self.precision, "heads", output.tokens_BSD.device.type) as cast:
            both_BD = torch.cat(cast(output.read_text()).chunk(2), dim=1)
            logits_B2 = self.out(self.norm(F.gelu(self.hidden(both_BD))))
        with region(self.precision, "losses", logits_B2.device.type) as cast:
            loss = F.cross_entropy(cast(logits_B2), target_B)
            of_samples = {} if self.training else {TERM: _of_samples(statements, cast(logits_B2), target_B)}
        return ObjectiveOutput(
            {TERM: Term(loss, 1.0, len(target_B))},
            {},
            output.plans,
            output.num_tokens,
            output.attention,
            judged=None if self.training else _judge(logits_B2, target_B, statements, answers),
            of_samples=of_samples,
        )

    def size(self, batch: Batch) -> BatchSize:
        """Return the number of statements, and tokens of their pass."""
        statements = batch.first(batch.pairs)
        number = torch.full((), statements.num_samples, device=batch.device)
        mask_BL = statements.text_mask_BL
        twice = None if mask_BL is None else mask_BL.repeat(2, 1)
        return BatchSize({TERM: number}, {"pair": PlanSize.of_pass(2 * number, twice, self.num_patches)})

    def head_costs(self, predictions: Mapping[str, int]) -> Costs:
        """8 D^2 + 8 D FLOPs for each statement."""
        statements, width = sum(predictions.values()), self.hidden.in_features
        return Costs(
            heads=2.0 * statements * width * (width + self.out.out_features),
            kept_by_norms=float(statements * width),
            kept_by_products=3.0 * statements * width,
        )

    def measures(self, prefix: str = "", weight: float = 1.0) -> list[Measure]:
        """Add accuracy and consistency."""
        return [*super().measures(prefix, weight), StatementAccuracy()]

    def targets(self, answers: Answers) -> Tensor:
        """Return 1 for true and 0 for false statements, int64 (B,).

        Raises:
            UserError: an answer is something else.
        """
        for given in answers.given:
            if len(given) != 1 or given[0] not in _TRUTH:
                raise UserError(
                    f"VisualReasoning: a sample has the answers {list(given)}, and a statement has one, true or false: "
                    "choose a set of `moevlm data convert statements` or `nlvr2`"
                )
        return torch.tensor([_TRUTH[given[0]] for given in answers.given])


def _of_samples(statements: Batch, logits_B2: Tensor, target_B: Tensor) -> SampleLosses:
    loss_B = F.cross_entropy(logits_B2, target_B, reduction="none")
    right_B = (logits_B2.argmax(dim=-1) == target_B).float()
    return SampleLosses(statements.keys, torch.arange(len(loss_B), device=loss_B.device), loss_B.detach(), right_B)


def _judge(logits_B2: Tensor, target_B: Tensor, statements: Batch, answers: Answers) -> Judged:
    assert statements.text_BL is not None and statements.text_mask_BL is not None
    texts = [
        text_L[mask_L] for text_L, mask_L in zip(statements.text_BL.cpu(), statements.text_mask_BL.cpu(), strict=True)
    ]
    said_B = logits_B2.detach().argmax(dim=-1)
    return Judged(
        tuple(map(bool, said_B.tolist())), tuple(map(bool, target_B.tolist())), answers.kinds, content_ids(texts)
    )
