"""Generates answers to held-out questions and scores them as VQA does: exact agreement with people after normalisation.

The metrics are those of `AnswerClassification`, so that both ways to answer can be compared: VQA accuracy by kind of
question, beside that of the best constant answer. A model that reads the questions of a source without its images
(`modality: text`) is the blind one.
"""

from lightning.pytorch import Trainer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.step_records import Answered
from lightning_moevlm.model.generation import Decoding, generate
from lightning_moevlm.model.metrics.tasks.vqa import VQAAccuracy
from lightning_moevlm.model.objectives import AnswerClassification, Draws, NextToken
from lightning_moevlm.training.callbacks.tasks.parts import HeldOutTask, find_data, find_objective
from lightning_moevlm.training.vision_language_module import VisionLanguageModule

_CHOICE = Draws(0)


class AnswerScores(HeldOutTask):
    """Logs VQA accuracy of generated answers.

    Args:
        decoding: how answers are generated.
        share: of the questions that are answered, chosen by their keys; generation takes far longer than the loss.

    Raises:
        UserError: a share outside (0, 1], an objective that does not predict answers as text, or one that chooses them
            from a list too.
    """

    def __init__(self, decoding: Decoding = Decoding(max_new_tokens=10), share: float = 1.0) -> None:
        check_number("share of AnswerScores", share, above=0, most=1)
        self.decoding = decoding
        self.share = share
        self._scores = VQAAccuracy()

    def check(self, trainer: Trainer, module: VisionLanguageModule) -> None:
        """Refuse a model that does not answer by text."""
        if not find_objective(module, NextToken, "AnswerScores").answers_only:
            raise UserError(
                "AnswerScores needs a model that predicts answers: set answers_only of NextToken to true, and "
                "data.append_answer to true"
            )
        if any(isinstance(part, AnswerClassification) for part in module.objective.modules()):
            raise UserError(
                "AnswerScores and AnswerClassification both log VQA accuracy: remove the callback, or that part"
            )
        find_data(trainer, "AnswerScores")

    def add(self, trainer: Trainer, module: VisionLanguageModule, batch: Batch) -> None:
        """Answer the questions of a batch."""
        objective = find_objective(module, NextToken, "AnswerScores")
        asked = module.objective.samples_of(objective, batch)
        if asked.answers is None or asked.text_BL is None:
            return
        drawn_N = _CHOICE.uniform("answered", asked.keys, 1)[:, 0].tolist()
        chosen = [row for row, given in enumerate(asked.answers.given) if given and drawn_N[row] < self.share]
        for rows in (range(asked.pairs), range(len(asked.image_keys), asked.num_samples)):  # pairs, texts alone
            self._answer(trainer, module, objective, asked.select([row for row in chosen if row in rows]))

    def compute(self, trainer: Trainer, module: VisionLanguageModule, stage: str) -> dict[str, float]:
        """Score."""
        values = dict(self._scores.compute(stage).values)
        self._scores.reset()
        return values

    def _answer(self, trainer: Trainer, module: VisionLanguageModule, objective: NextToken, asked: Batch) -> None:
        """Answer questions that all have an image, or none of which has one."""
        if asked.text_BL is None or asked.text_mask_BL is None or asked.answers is None:
            return
        backbone, tokenizer = module.backbone, find_data(trainer, "AnswerScores").tokenizer
        prompt_BL, prompt_mask_BL = objective.prompts(asked.text_BL, asked.text_mask_BL)
        with trainer.precision_plugin.val_step_context():
            found = generate(
                backbone,
                lambda features_MD: objective.logits(backbone, features_MD),
                asked.images_BRYX,
                prompt_BL,
                prompt_mask_BL,
                self.decoding,
                asked.keys,
            )
        said = tuple(tokenizer.decode(ids).strip() for ids in found.text_BN.tolist())
        self._scores.add(Answered(said, asked.answers.given, asked.answers.kinds))
