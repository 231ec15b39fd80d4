"""Probes of a model's image features: against the features themselves, the same whatever the batch size."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.read.mixture import Source
from lightning_moevlm.model.metrics.tasks.probes import linear_probe, nearest_neighbours
from lightning_moevlm.model.objectives import Contrastive
from lightning_moevlm.training.callbacks import LabelProbes
from tests.training.callbacks.test_caption_scores import captioner


def images_of(root: Path, batch_size: int, annotation: str | None = "ground") -> ShardDataModule:
    """Images alone with the colour of their ground as class; 100 ids, fewer than the set's tokenizer has."""
    source = Source(str(root), modality="image")
    return ShardDataModule(None, batch_size, 32, 24, 100, sources={"scenes": source}, annotation=annotation)


def validated(root: Path, batch_size: int, callback: LabelProbes, **options: object) -> dict[str, float]:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback]
    )
    trainer.validate(captioner(Contrastive), images_of(root, batch_size, **options), verbose=False)  # type: ignore[arg-type]
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_scores_are_those_of_the_features_for_every_batch_size(scenes_root: Path) -> None:
    found = validated(scenes_root, 32, LabelProbes(k=5))
    module, data = captioner(Contrastive).eval(), images_of(scenes_root, 32)
    features: dict[str, list] = {}
    for split, loader in (("train", data.ordered_train_dataloader()), ("val", data.val_dataloader())):
        rows = []
        for batch in loader:
            assert batch.text_BL is None and batch.answers is not None
            with torch.no_grad():
                pooled = module.backbone(batch.images_BRYX).pool(Modality.IMAGE)
            rows += zip(batch.keys, pooled, (given[0] for given in batch.answers.given), strict=True)
        features[split] = sorted(rows, key=lambda row: row[0])
    classes = sorted({label for _, _, label in features["train"]})
    train, held = (torch.stack([feature for _, feature, _ in rows]) for rows in features.values())
    class_N, class_M = (torch.tensor([classes.index(row[2]) for row in rows]) for rows in features.values())
    chosen = {
        "linear_probe": linear_probe(train, class_N, held, len(classes)),
        "knn": nearest_neighbours(train, class_N, held, len(classes), 5, 0.07),
    }
    for name, scores in chosen.items():
        assert found[f"val/{name}/top1"] == pytest.approx(float((scores.argmax(1) == class_M).double().mean()))
    assert found["val/probe_baseline/chance"] == pytest.approx(1 / len(classes))
    assert found["val/probe_baseline/majority"] == pytest.approx(int(class_M.bincount().max()) / len(class_M))
    assert not any("loss" in key for key in found)  # contrast has no use for images alone
    assert validated(scenes_root, 7, LabelProbes(k=5)) == pytest.approx(found)


def test_a_part_of_the_training_split_will_do(scenes_root: Path) -> None:
    assert validated(scenes_root, 8, LabelProbes(max_samples=30))["val/probe_baseline/chance"] > 0


def test_what_cannot_be_probed_is_refused(scenes_root: Path) -> None:
    with pytest.raises(UserError, match=r"LabelProbes needs the class of each sample: set data\.annotation"):
        validated(scenes_root, 32, LabelProbes(), annotation=None)
    for options, match in (({"k": 0}, "k of LabelProbes"), ({"temperature": 0.0}, "temperature of"),
                           ({"max_samples": 1}, "max_samples of")):  # fmt: skip
        with pytest.raises(UserError, match=match):
            LabelProbes(**options)
