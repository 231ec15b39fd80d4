"""Perplexity of a model that knows how often each token occurs in the training set, and nothing else.

p(token) = (its count among the predicted tokens of training + 1) / (their number + vocabulary)
"""

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.metrics.running_sums import RunningSums
from lightning_moevlm.model.metrics.tasks.perplexity import exp
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.training.callbacks.tasks.parts import HeldOutTask, find_data, find_objective
from lightning_moevlm.training.vision_language_module import VisionLanguageModule


class UnigramPerplexity(HeldOutTask):
    """Logs the perplexity that word frequencies alone reach, beside that of the model.

    It reads the texts of the whole training split once, before the first result.

    Raises:
        UserError: an objective without NextToken.
    """

    def __init__(self) -> None:
        self._train = RunningSums[str]()  # tokens by id
        self._held = RunningSums[str]()  # the same, by term

    def check(self, trainer: Trainer, module: VisionLanguageModule) -> None:
        """Refuse a model that predicts no next tokens."""
        find_objective(module, NextToken, "UnigramPerplexity")
        find_data(trainer, "UnigramPerplexity")

    def add(self, trainer: Trainer, module: VisionLanguageModule, batch: Batch) -> None:
        """Count the tokens of a batch."""
        _count(self._held, batch, module.backbone.spec.vocab_size)

    def compute(self, trainer: Trainer, module: VisionLanguageModule, stage: str) -> dict[str, float]:
        """Return the perplexity of texts after an image and of texts alone, as far as there are any."""
        held = self._held.totals()
        self._held.reset()
        train = self._train.totals()
        if not train:
            for batch in find_data(trainer, "UnigramPerplexity").ordered_train_dataloader():
                _count(self._train, batch, module.backbone.spec.vocab_size)
            train = self._train.totals()
        count_V: Tensor = torch.stack([*train.values(), torch.ones(module.backbone.spec.vocab_size)]).sum(dim=0)
        log_p_V = (count_V / count_V.sum()).log()
        return {
            metric_keys.UNIGRAM_PERPLEXITY.key(stage=stage, term=term): exp(float(-(held_V @ log_p_V) / held_V.sum()))
            for term, held_V in held.items()
            if held_V.any()
        }


def _count(sums: RunningSums[str], batch: Batch, vocab_size: int) -> None:
    """Count what NextToken predicts of a batch in evaluation: all tokens of a text but its first, of all captions."""
    if batch.text_BL is None or batch.text_mask_BL is None:
        return
    for term, rows in (("caption", slice(0, batch.pairs)), ("text", slice(batch.pairs, None))):
        token_M = batch.text_BL[rows, 1:][batch.text_mask_BL[rows, 1:]]
        sums.add(term, torch.bincount(token_M.cpu(), minlength=vocab_size))
    further = batch.further_captions
    if further is not None:
        token_M = further.text_ML[:, 1:][further.text_mask_ML[:, 1:]]
        sums.add("caption", torch.bincount(token_M.cpu(), minlength=vocab_size))
