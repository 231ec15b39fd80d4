"""The perplexity of token frequencies, against a count by hand."""

import math
from collections import Counter
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.read.mixture import Source
from lightning_moevlm.model.objectives import MaskedModelling, NextToken
from lightning_moevlm.training.callbacks import UnigramPerplexity
from tests.training.callbacks.test_caption_scores import captioner


def texts_of(root: Path, batch_size: int) -> ShardDataModule:
    source = Source(str(root), modality="text")
    return ShardDataModule(None, batch_size, 32, 24, 400, sources={"captions": source})


def validated(root: Path, batch_size: int, objective: object = NextToken) -> dict[str, float]:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[UnigramPerplexity()],
    )  # fmt: skip
    trainer.validate(captioner(objective), texts_of(root, batch_size), verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_texts_alone_have_perplexities_for_every_batch_size(scenes_root: Path) -> None:
    found = validated(scenes_root, 32)
    data = texts_of(scenes_root, 32)
    counts: dict[str, Counter[int]] = {}
    for split, loader in (("train", data.ordered_train_dataloader()), ("val", data.val_dataloader())):
        batches = list(loader)
        assert all(batch.images_BRYX is None for batch in batches)
        rows = [row for batch in batches for row in batch.text_BL.tolist()]
        counts[split] = Counter(token for row in rows for token in row[1:] if token)  # 0 is padding
    nats = [
        -math.log((counts["train"][token] + 1) / (counts["train"].total() + 400)) for token in counts["val"].elements()
    ]
    assert found["val/unigram_perplexity/text"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-6)
    assert found["val/perplexity/text"] == pytest.approx(math.exp(found["val_loss/text"]), rel=1e-6)
    assert validated(scenes_root, 5) == pytest.approx(found, rel=2e-5)


def test_an_objective_without_next_tokens_is_refused(scenes_root: Path) -> None:
    with pytest.raises(UserError, match="NextToken, or a Joint with it"):
        validated(scenes_root, 32, MaskedModelling)
