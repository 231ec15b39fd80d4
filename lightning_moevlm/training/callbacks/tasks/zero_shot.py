"""Classifies held-out images by the names of their classes, on which it was not trained (CLIP, arXiv 2103.00020, 3.1).

embedding of a class = mean over templates of the text's embedding, scaled to length 1
class of an image    = the one whose embedding is most similar
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.answer_list import read_answers
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.metrics.running_sums import RunningSums
from lightning_moevlm.model.objectives import Contrastive
from lightning_moevlm.training.callbacks.tasks.parts import find_data, find_objective
from lightning_moevlm.training.evaluation import log_values
from lightning_moevlm.training.vision_language_module import VisionLanguageModule

TEMPLATES = ("{c}", "a {c}", "a picture of a {c}")


class ZeroShot(Callback):
    """Logs top-1, top-5 and the mean over classes of top-1, beside chance and the most frequent class.

    The class of a sample is its annotation (`data.annotation`): a name of the list, or the number, from 0, of its line.
    Samples without one are left out.

    Args:
        classes: file of `moevlm data answers`, or one with the name of a class per line, such as classnames.txt of
            CLIP_benchmark.
        templates: file with a template per line, {c} in place of the name, such as its
            zeroshot_classification_templates.txt; null takes three short ones.

    Raises:
        UserError: a file cannot be used, data without classes, or an objective without Contrastive.
    """

    def __init__(self, classes: str, templates: str | None = None) -> None:
        is_counted = classes.endswith(".json")
        self.classes = read_answers(Path(classes)).answers if is_counted else _read_lines(classes, "classes")
        self.templates = TEMPLATES if templates is None else _read_lines(templates, "templates")
        without = [template for template in self.templates if "{c}" not in template]
        if without:
            raise UserError(f"ZeroShot: template {without[0]!r} of {templates} has no {{c}} for the name of the class")
        self._number = {name: index for index, name in enumerate(self.classes)}
        self._sums = RunningSums[int]()  # by class: hits of top-1, of top-5, samples
        self._class_CD: Tensor | None = None  # by the weights that are evaluated

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model without a common space of images and texts, or data without classes."""
        if stage != "predict":
            find_objective(pl_module, Contrastive, "ZeroShot")
            if find_data(trainer, "ZeroShot").annotation is None:
                raise UserError(
                    "ZeroShot needs the class of each sample: set data.annotation to the field that names it"
                )

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Classify the images of a batch."""
        self._add(trainer, pl_module, arguments[1])

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Classify the images of a batch."""
        self._add(trainer, pl_module, arguments[1])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._log(pl_module, "test")

    def _add(self, trainer: Trainer, pl_module: LightningModule, batch: Batch) -> None:
        if batch.images_BRYX is None or batch.answers is None:
            return
        assert isinstance(pl_module, VisionLanguageModule)
        objective, backbone = find_objective(pl_module, Contrastive, "ZeroShot"), pl_module.backbone
        tokenizer = find_data(trainer, "ZeroShot").tokenizer
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            if self._class_CD is None:
                self._class_CD = self._embed_classes(objective, backbone, tokenizer, pl_module.device)
            image_BD = objective.embed_images(backbone(batch.images_BRYX).pool(Modality.IMAGE))
        similarity_BC = image_BD @ self._class_CD.T
        top_BK = similarity_BC.topk(min(5, len(self.classes)), dim=1).indices.cpu()
        for top_K, labels in zip(top_BK, batch.answers.given[: len(top_BK)], strict=True):
            if not labels:
                continue
            number = self._find(labels[0])
            hit_K = top_K == number
            self._sums.add(number, torch.stack([hit_K[0], hit_K.any(), torch.tensor(True)]))

    def _embed_classes(
        self, objective: Contrastive, backbone: Backbone, tokenizer: CaptionTokenizer, device: torch.device
    ) -> Tensor:
        found: list[Tensor] = []
        for name in self.classes:
            texts = [template.replace("{c}", name) for template in self.templates]
            text_BL, text_mask_BL, _ = tokenizer.encode(texts, backbone.spec.max_text_len)
            output = backbone(None, text_BL.to(device), text_mask_BL.to(device))
            found.append(objective.embed_texts(output.pool(Modality.TEXT)).mean(dim=0))
        return F.normalize(torch.stack(found), dim=-1)

    def _find(self, label: str) -> int:
        number = self._number.get(label, int(label) if label.isdigit() else -1)
        if not 0 <= number < len(self.classes):
            raise UserError(
                f"ZeroShot: a sample has the class {label!r}, which is not one of the {len(self.classes)} names in the "
                "list of classes, nor the number of one; give the list of this set"
            )
        return number

    def _log(self, pl_module: LightningModule, stage: str) -> None:
        totals = self._sums.totals()
        self._sums.reset()
        self._class_CD = None
        if not totals:
            return
        sums_C3 = torch.stack(list(totals.values()))
        number = sums_C3[:, 2].sum()
        scores = {
            "top1": sums_C3[:, 0].sum() / number,
            "top5": sums_C3[:, 1].sum() / number,
            "mean_per_class": (sums_C3[:, 0] / sums_C3[:, 2]).mean(),
        }
        baselines = {"chance": torch.tensor(1 / len(self.classes)), "majority": sums_C3[:, 2].max() / number}
        values = {metric_keys.ZERO_SHOT.key(stage=stage, score=name): value for name, value in scores.items()}
        values |= {metric_keys.ZERO_SHOT_BASELINE.key(stage=stage, score=name): v for name, v in baselines.items()}
        log_values(pl_module, values)


def _read_lines(path: str, what: str) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        raise UserError(f"ZeroShot: {what} {path} cannot be read ({error}); give a text file, one per line") from None
    found = tuple(line for line in lines if line)
    if not found or len(set(found)) < len(found):
        raise UserError(f"ZeroShot: {what} {path} is empty, or has a line twice; give one per line")
    return found
