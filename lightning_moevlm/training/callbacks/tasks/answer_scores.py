"""Generates answers to held-out questions and scores them as VQA does: exact agreement with people after normalisation.

Instead of generating, the likeliest of a list of answers can be taken, which goes on from the question once for each of
them. The metrics are those of `AnswerClassification`, so that both ways to answer can be compared: VQA accuracy by kind
of question, beside that of the best constant answer. A model that reads the questions of a source without its images
(`modality: text`) is the blind one.
"""

from pathlib import Path

from lightning.pytorch import Trainer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.answer_list import read_answers
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.step_records import Answered
from lightning_moevlm.model.generation import Decoding
from lightning_moevlm.model.metrics.tasks.vqa import VQAAccuracy
from lightning_moevlm.model.objectives import AnswerClassification, Draws, NextToken
from lightning_moevlm.training.callbacks.tasks.parts import HeldOutTask, find_data, find_objective
from lightning_moevlm.training.callbacks.tasks.replies import choose_texts, generate_texts
from lightning_moevlm.training.vision_language_module import VisionLanguageModule

_CHOICE = Draws(0)


class AnswerScores(HeldOutTask):
    """Logs VQA accuracy of generated answers.

    Args:
        decoding: how answers are generated.
        share: of the questions that are answered, chosen by their keys; generation takes far longer than the loss.
        answers: file of `moevlm data answers`, whose likeliest answer is taken; null generates answers.

    Raises:
        UserError: a share outside (0, 1], a wrong file, an objective that does not predict answers as text, or one that
            chooses them from a list too.
    """

    def __init__(
        self, decoding: Decoding = Decoding(max_new_tokens=10), share: float = 1.0, answers: str | None = None
    ) -> None:
        check_number("share of AnswerScores", share, above=0, most=1)
        self.decoding = decoding
        self.share = share
        self.answers = None if answers is None else read_answers(Path(answers)).answers
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
        if asked.text_BL is None or asked.answers is None:
            return
        if self.answers is None:
            said = generate_texts(trainer, module, objective, asked, self.decoding, "AnswerScores")
        else:
            said = choose_texts(trainer, module, objective, asked, self.answers, "AnswerScores")
        self._scores.add(Answered(said, asked.answers.given, asked.answers.kinds))
