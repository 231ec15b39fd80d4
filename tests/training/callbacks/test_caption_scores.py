"""Captions of held-out images: the same whatever the batch size, beside another image's caption."""

from functools import partial
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.model.backbones import LIMoE
from lightning_moevlm.model.generation import Decoding
from lightning_moevlm.model.objectives import Contrastive, Joint, MaskedModelling, NextToken
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import CaptionScores
from tests.small_model import small_moe


def captioner(objective: object = NextToken, max_text_len: int = 24) -> VisionLanguageModule:
    backbone = LIMoE(
        dim=32, num_heads=2, num_blocks=2, hidden_dim=64, image_size=32, patch_size=16, vocab_size=400,
        max_text_len=max_text_len,
        moe=small_moe(),
    )  # fmt: skip
    return VisionLanguageModule(backbone, objective, init_std=0.3)  # type: ignore[arg-type]


def validated(root: Path, batch_size: int, callback: CaptionScores, objective: object = NextToken) -> dict[str, float]:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback]
    )
    data = ShardDataModule(str(root), batch_size, 32, 24, 400)
    trainer.validate(captioner(objective), data, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/caption")}


def test_scores_do_not_depend_on_the_batch_size(scenes_root: Path) -> None:
    callback = CaptionScores(Decoding("sample", max_new_tokens=8, seed=1))
    expected = validated(scenes_root, 32, callback)
    assert {
        f"val/{name}" for name in ("caption/bleu4", "caption/rouge_l", "caption/chrf", "caption_chance/bleu4")
    } <= expected.keys()
    assert expected["val/caption_chance/rouge_l"] > expected["val/caption/rouge_l"] > 0  # untrained
    assert validated(scenes_root, 4, callback) == pytest.approx(expected)


def test_a_share_of_the_images_is_captioned(scenes_root: Path) -> None:
    counts: list[int] = []

    class Counting(CaptionScores):
        def compute(self, *arguments: object) -> dict[str, float]:
            counts.append(len(self._generated))
            return {}

    for share in (1.0, 0.5):
        validated(scenes_root, 32, Counting(Decoding(max_new_tokens=2), share))
    assert 0 < counts[1] < counts[0]


def test_a_joint_objective_with_captions_will_do(scenes_root: Path) -> None:
    joint = partial(Joint, parts={"contrast": Contrastive, "caption": NextToken})
    assert validated(scenes_root, 32, CaptionScores(Decoding(max_new_tokens=2)), joint)


def test_an_objective_without_captions_is_refused(scenes_root: Path) -> None:
    with pytest.raises(UserError, match="NextToken, or a Joint with it"):
        validated(scenes_root, 32, CaptionScores(), MaskedModelling)
    with pytest.raises(UserError, match="share of CaptionScores"):
        CaptionScores(share=0.0)
