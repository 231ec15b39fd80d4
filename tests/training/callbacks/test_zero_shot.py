"""Zero-shot classification: by hand, the same whatever the batch size, and what is refused."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.answer_list import write_answers
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.data.count_answers import count_answers
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.annotations import Annotation
from lightning_moevlm.model.objectives import Contrastive, MaskedModelling
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import ZeroShot
from lightning_moevlm.training.callbacks.tasks.zero_shot import TEMPLATES
from tests.training.callbacks.test_caption_scores import captioner


@pytest.fixture(scope="module")
def grounds(scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The colours of the grounds as classes."""
    path = tmp_path_factory.mktemp("classes") / "grounds.json"
    write_answers(count_answers(ShardStorage(str(scenes_root)), None, Annotation("ground"))[0], path)
    return str(path)


def validated(
    root: Path, batch_size: int, callback: ZeroShot, objective: object = Contrastive, annotation: str | None = "ground"
) -> tuple[dict[str, float], VisionLanguageModule, ShardDataModule]:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback]
    )
    data = ShardDataModule(str(root), batch_size, 32, 24, 400, annotation=annotation)
    module = captioner(objective)
    trainer.validate(module, data, verbose=False)
    values = {key: float(value) for key, value in trainer.callback_metrics.items() if "zero_shot" in key}
    return values, module, data


def test_scores_by_hand_and_for_every_batch_size(scenes_root: Path, grounds: str) -> None:
    callback = ZeroShot(grounds)
    found, module, data = validated(scenes_root, 32, callback)
    module.eval()
    data.trainer = None
    class_CD = []
    for name in callback.classes.names:
        texts = [name, f"a {name}", f"a picture of a {name}"]
        text_BL, mask_BL, _ = data.tokenizer.encode(texts, 24)
        with torch.no_grad():
            class_CD.append(
                module.objective.embed_texts(module.backbone(None, text_BL, mask_BL).pool(Modality.TEXT)).mean(0)
            )
    hits: dict[str, list[float]] = {}
    top5 = []
    for batch in data.val_dataloader():
        with torch.no_grad():
            image_BD = module.objective.embed_images(module.backbone(batch.images_BRYX).pool(Modality.IMAGE))
        for image_D, (label,) in zip(image_BD, batch.answers.given, strict=True):
            scores = [float(image_D @ each / each.norm()) for each in class_CD]
            ranked = [name for _, name in sorted(zip(scores, callback.classes.names, strict=True), reverse=True)]
            hits.setdefault(label, []).append(float(ranked[0] == label))
            top5.append(float(label in ranked[:5]))
    every = [hit for of_class in hits.values() for hit in of_class]
    assert found["val/zero_shot/top1"] == pytest.approx(sum(every) / len(every))
    assert found["val/zero_shot/top5"] == pytest.approx(sum(top5) / len(top5))
    per_class = [sum(of_class) / len(of_class) for of_class in hits.values()]
    assert found["val/zero_shot/mean_per_class"] == pytest.approx(sum(per_class) / len(per_class))
    assert found["val/zero_shot_baseline/chance"] == pytest.approx(1 / len(callback.classes.names))
    assert found["val/zero_shot_baseline/majority"] == pytest.approx(max(map(len, hits.values())) / len(every))
    assert validated(scenes_root, 4, callback)[0] == pytest.approx(found)


def test_a_folder_of_clip_benchmark_gives_classes_and_templates(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    assert ZeroShot(str(tmp_path)).templates == TEMPLATES
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    (tmp_path / "own.txt").write_text("my {c}\n")
    callback = ZeroShot(str(tmp_path))
    assert (callback.classes.names, callback.templates) == (("cat", "dog"), ("a photo of a {c}.", "{c}"))
    assert ZeroShot(str(tmp_path), str(tmp_path / "own.txt")).templates == ("my {c}",)


def test_what_cannot_be_classified_is_refused(scenes_root: Path, grounds: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Contrastive, or a Joint with it"):
        validated(scenes_root, 32, ZeroShot(grounds), MaskedModelling)
    with pytest.raises(UserError, match=r"set data\.annotation"):
        validated(scenes_root, 32, ZeroShot(grounds), annotation=None)
    with pytest.raises(UserError, match="has no class in planet"):
        validated(scenes_root, 32, ZeroShot(grounds), annotation="planet")
    (tmp_path / "templates.txt").write_text("a photo\n")
    with pytest.raises(UserError, match=r"has no \{c\}"):
        ZeroShot(grounds, str(tmp_path / "templates.txt"))


def test_a_class_may_be_null_but_not_missing() -> None:
    annotation = Annotation("group")
    assert annotation.read(b'{"group": "animals"}') == (("animals",), "")
    assert annotation.read(b'{"group": null}') == ((), "")
    assert annotation.read(b'{"other": 1}') == (None, "")
    assert Annotation("answers").read(b'{"answers": null}') == (None, "")
    assert Annotation("cls").read(b"7") == (("7",), "")
