"""VQA accuracy: how many of the people who answered a question agree with the model (arXiv 1505.00468, section 3.3).

    accuracy = mean over the given answers i of min(1, matches among the other answers / 3)

With ten answers per question this is the score of VQA v1 and v2. A question with a single answer scores 1 for that
answer. Answers are compared without case, articles and punctuation, and with number words as digits. The majority
baseline gives, for every kind of question, the answer that scores best on all of that kind, found in hindsight.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.step_records import Answered, ObjectiveOutput
from lightning_moevlm.model.metrics.measure import Measure, Measured
from lightning_moevlm.model.metrics.running_sums import RunningSums

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_BETWEEN_DIGITS = re.compile(r"(?<=\d)[,.](?=\d)")
_APOSTROPHES = re.compile(r"['`\u2019]")
_PUNCTUATION = re.compile(r"[^\w\s.]|\.(?!\d)|_")
ALL = "all"


def normalise_answer(answer: str) -> str:
    """Return an answer as it is compared.

    Thousands separators and apostrophes are dropped, other punctuation becomes a blank.
    """
    text = _BETWEEN_DIGITS.sub(lambda sign: "" if sign[0] == "," else ".", answer.lower())
    words = _PUNCTUATION.sub(" ", _APOSTROPHES.sub("", text)).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(predicted: str, given: Sequence[str]) -> float:
    """Return the score of one prediction in [0, 1]; given: the answers of people, at least one."""
    answer, answers = normalise_answer(predicted), [normalise_answer(each) for each in given]
    if len(answers) == 1:
        return float(answer == answers[0])
    matches = answers.count(answer)
    return sum(min(1.0, (matches - (each == answer)) / 3) for each in answers) / len(answers)


class Score(NamedTuple):
    """Mean scores of some questions: of the model, and of the best constant answer per kind."""

    accuracy: float
    majority: float
    num_questions: float


class VQAAccuracy(Measure):
    """Adds up scores by kind of question, with those of every constant answer."""

    alone = "VQA accuracy"

    def __init__(self) -> None:
        self._sums = RunningSums[tuple[str, str | None]]()  # (kind, constant answer); None is the model

    def update(self, output: ObjectiveOutput) -> None:
        """Add the questions of one batch."""
        if output.answered is not None:
            self.add(output.answered)

    def add(self, answered: Answered) -> None:
        """Add questions; those without an answer are left out."""
        for predicted, given, kind in zip(*answered, strict=True):
            if given:
                self._sums.add((kind, None), _float32(vqa_accuracy(predicted, given), 1.0))
                for answer in {normalise_answer(each) for each in given}:
                    self._sums.add((kind, answer), _float32(vqa_accuracy(answer, given), 0.0))

    def compute(self, stage: str) -> Measured:
        """Return the scores under their keys."""
        values: dict[str, float] = {}
        for kind, score in self.scores().items():
            part = re.sub(r"[^\w.-]", "_", kind)  # as in yes/no
            values[metric_keys.VQA_ACCURACY.key(stage=stage, kind=part)] = score.accuracy
            values[metric_keys.VQA_MAJORITY.key(stage=stage, kind=part)] = score.majority
        return Measured(values)

    def scores(self) -> dict[str, Score]:
        """Return the scores by kind, all of them under `ALL`; {} without any. All ranks must ask together."""
        totals = self._sums.totals()
        found: dict[str, Score] = {}
        for kind in sorted({kind for kind, _ in totals}):
            score, number = totals[kind, None].tolist()
            best = max(float(sums[0]) for (of, answer), sums in totals.items() if of == kind and answer is not None)
            found[kind] = Score(score / number, best / number, number)
        if found:
            number = sum(each.num_questions for each in found.values())
            accuracy = sum(each.accuracy * each.num_questions for each in found.values()) / number
            majority = sum(each.majority * each.num_questions for each in found.values()) / number
            found[ALL] = Score(accuracy, majority, number)
        return found

    def reset(self) -> None:
        """Forget all batches."""
        self._sums.reset()


def _float32(*values: float) -> torch.Tensor:
    """Return them in fp32; bf16-true has another default dtype within a step."""
    return torch.tensor(values, dtype=torch.float32)
