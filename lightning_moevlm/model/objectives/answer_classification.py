"""Visual question answering as classification: one of a fixed list of answers (BEiT-3, arXiv 2208.10442, section 3.1).

    target of an answer = min(1, people who gave it / 3), 1 where a question has a single answer
    loss = binary cross-entropy of every answer with its target, summed over answers, mean over questions

The head reads the first token of the question after both modalities have seen each other; in a causal model the last
token, which alone has seen the whole question. Questions none of whose answers is in the list train nothing but lower
logits, and count in evaluation as any other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.answer_list import read_answers
from lightning_moevlm.contracts.batch import Answers, Batch
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.step_records import Answered, BatchSize, ObjectiveOutput, PlanSize, SampleLosses, Term
from lightning_moevlm.model.backbones import Backbone, BackboneSpec
from lightning_moevlm.model.metrics.measure import Measure
from lightning_moevlm.model.metrics.tasks.vqa import VQAAccuracy
from lightning_moevlm.model.objectives.draws import Draws
from lightning_moevlm.model.objectives.objective import Objective
from lightning_moevlm.model.precision import region

TERM = "answer"


class AnswerClassification(Objective):
    """Chooses an answer to the question about an image.

    Args:
        spec: the backbone's dimensions.
        answers: file of `moevlm data answers`.
        sees_images: false hides every patch, so that what questions alone give away is measured (a blind model).

    Raises:
        UserError: the file is missing or is no list of answers.
    """

    def __init__(self, spec: BackboneSpec, answers: str, sees_images: bool = True) -> None:
        super().__init__()
        self.answers = read_answers(Path(answers)).answers
        self.sees_images = sees_images
        self.num_patches = spec.num_patches
        self._class_of = {answer: index for index, answer in enumerate(self.answers)}
        self.hidden = nn.Linear(spec.dim, 2 * spec.dim)
        self.norm = nn.LayerNorm(2 * spec.dim)
        self.out = nn.Linear(2 * spec.dim, len(self.answers))
        self.num_classes = {}

    def can_use(self, batch: Batch) -> bool:
        """Return whether a batch holds questions about images, with their answers."""
        return batch.pairs > 0 and batch.answers is not None

    def forward(self, backbone: Backbone, batch: Batch, draws: Draws) -> ObjectiveOutput:
        """Answer the questions of the batch's pairs."""
        questions = batch.first(batch.pairs)
        if questions.images_BRYX is None or questions.answers is None:
            raise UserError(
                "AnswerClassification needs images with questions and their answers, and this batch has none: choose "
                "a set of `moevlm data convert questions`, and set data.annotation to answers"
            )
        every_BP = torch.ones(len(questions.keys), self.num_patches, dtype=torch.bool, device=batch.device)
        output = backbone(*questions[:3], image_mask_BP=None if self.sees_images else every_BP)
        with region(self.precision, "heads", output.tokens_BSD.device.type) as cast:
            question_BD = cast(output.read_text())
            logits_BA = self.out(self.norm(F.gelu(self.hidden(question_BD))))
        target_BA = self.targets(questions.answers, logits_BA.device)
        with region(self.precision, "losses", logits_BA.device.type) as cast:
            loss_B = F.binary_cross_entropy_with_logits(cast(logits_BA), target_BA, reduction="none").sum(dim=1)
        return ObjectiveOutput(
            {TERM: Term(loss_B.mean(), 1.0, len(target_BA))},
            {},
            output.plans,
            output.num_tokens,
            output.attention,
            answered=None if self.training else self._answered(logits_BA, questions.answers),
            of_samples={} if self.training else {TERM: _of_samples(questions, loss_B, logits_BA, target_BA)},
        )

    def size(self, batch: Batch) -> BatchSize:
        """Return the number of questions, and tokens of their pass."""
        questions = batch.first(batch.pairs)
        number = torch.full((), questions.num_samples, device=batch.device)
        return BatchSize({TERM: number}, {"pair": PlanSize.of_pass(number, questions.text_mask_BL, self.num_patches)})

    def measures(self, prefix: str = "", weight: float = 1.0) -> list[Measure]:
        """Add VQA accuracy."""
        return [*super().measures(prefix, weight), VQAAccuracy()]

    def head_costs(self, predictions: Mapping[str, int]) -> Costs:
        """4 D^2 + 4 D A FLOPs for each question."""
        questions, dim, answers = sum(predictions.values()), self.hidden.in_features, len(self.answers)
        return Costs(
            heads=4.0 * questions * dim * (dim + answers),
            kept_by_norms=2.0 * questions * (dim + answers),
            kept_by_products=5.0 * questions * dim,
        )

    def targets(self, answers: Answers, device: torch.device) -> Tensor:
        """Return the target of every answer of the list, fp32 (B, A)."""
        target_BA = torch.zeros(len(answers.given), len(self.answers), dtype=torch.float32)
        for row_A, given in zip(target_BA, answers.given, strict=True):
            for answer in set(given):
                if answer in self._class_of:
                    row_A[self._class_of[answer]] = _soft_score(answer, given)
        return target_BA.to(device, non_blocking=True)

    def _answered(self, logits_BA: Tensor, answers: Answers) -> Answered:
        chosen = logits_BA.detach().argmax(dim=-1).tolist()
        return Answered(tuple(self.answers[index] for index in chosen), answers.given, answers.kinds)


def _of_samples(questions: Batch, loss_B: Tensor, logits_BA: Tensor, target_BA: Tensor) -> SampleLosses:
    """Return the loss of each question; a chosen answer is as right as its target says."""
    right_B = target_BA.gather(1, logits_BA.argmax(dim=1, keepdim=True)).squeeze(1)
    return SampleLosses(questions.keys, torch.arange(len(loss_B), device=loss_B.device), loss_B.detach(), right_B)


def _soft_score(answer: str, given: Sequence[str]) -> float:
    return 1.0 if len(given) == 1 else min(1.0, given.count(answer) / 3)
