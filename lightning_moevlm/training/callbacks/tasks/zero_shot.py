"""Classifies held-out images by the names of their classes, on which it was not trained (CLIP, arXiv 2103.00020, 3.1).

embedding of a class = mean over templates of the text's embedding, scaled to length 1
class of an image    = the one whose embedding is most similar
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.answer_list import read_classes, read_lines
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.metrics.running_sums import RunningSums
from lightning_moevlm.model.metrics.tasks.class_scores import count_hits, score_classes
from lightning_moevlm.model.objectives import Contrastive
from lightning_moevlm.training.callbacks.tasks.parts import HeldOutTask, find_data, find_objective, require_labels
from lightning_moevlm.training.vision_language_module import VisionLanguageModule

TEMPLATES = ("{c}", "a {c}", "a picture of a {c}")
_CLASSES, _TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"  # in a folder of CLIP_benchmark


class ZeroShot(HeldOutTask):
    """Logs top-1, top-5 and the mean over classes of top-1, beside chance and the most frequent class.

    The class of a sample is its annotation (`data.annotation`): a name of the list, or the number, from 0, of its line.
    Samples without one are left out.

    Args:
        classes: file of `moevlm data answers`, one with the name of a class per line, or a folder with the
            classnames.txt and zeroshot_classification_templates.txt of CLIP_benchmark.
        templates: file with a template per line, {c} in place of the name; null takes those of the folder, or three
            short ones.

    Raises:
        UserError: a file cannot be used, data without classes, or an objective without Contrastive.
    """

    def __init__(self, classes: str, templates: str | None = None) -> None:
        path, of_folder = Path(classes), Path(classes) / _TEMPLATES
        self.classes = read_classes(path / _CLASSES if path.is_dir() else path)
        source = of_folder if templates is None and of_folder.is_file() else templates
        self.templates = TEMPLATES if source is None else read_lines(Path(source), "templates")
        without = [template for template in self.templates if "{c}" not in template]
        if without:
            raise UserError(f"ZeroShot: template {without[0]!r} of {source} has no {{c}} for the name of the class")
        self._hits = RunningSums[int]()  # by class
        self._class_CD: Tensor | None = None  # by the weights that are evaluated

    def check(self, trainer: Trainer, module: VisionLanguageModule) -> None:
        """Refuse a model without a common space of images and texts, or data without classes."""
        find_objective(module, Contrastive, "ZeroShot")
        require_labels(trainer, "ZeroShot")

    def add(self, trainer: Trainer, module: VisionLanguageModule, batch: Batch) -> None:
        """Classify the images of a batch."""
        if batch.images_BRYX is None or batch.answers is None:
            return
        objective, backbone = find_objective(module, Contrastive, "ZeroShot"), module.backbone
        tokenizer = find_data(trainer, "ZeroShot").tokenizer
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            if self._class_CD is None:
                self._class_CD = self._embed_classes(objective, backbone, tokenizer, module.device)
            image_BD = objective.embed_images(backbone(batch.images_BRYX).pool(Modality.IMAGE))
        labels = batch.answers.given[: len(image_BD)]
        rows = [row for row, given in enumerate(labels) if given]
        class_B = torch.tensor([self.classes.number(labels[row][0]) for row in rows], dtype=torch.int64)
        for number, counts in count_hits((image_BD @ self._class_CD.T)[rows], class_B).items():
            self._hits.add(number, counts)

    def compute(self, trainer: Trainer, module: VisionLanguageModule, stage: str) -> dict[str, float]:
        """Score."""
        hits = self._hits.totals()
        self._hits.reset()
        self._class_CD = None
        families = (metric_keys.ZERO_SHOT, metric_keys.ZERO_SHOT_BASELINE)
        return score_classes(hits, len(self.classes.names), stage, *families)

    def _embed_classes(
        self, objective: Contrastive, backbone: Backbone, tokenizer: CaptionTokenizer, device: torch.device
    ) -> Tensor:
        found: list[Tensor] = []
        for name in self.classes.names:
            texts = [template.replace("{c}", name) for template in self.templates]
            text_BL, text_mask_BL, _ = tokenizer.encode(texts, backbone.spec.max_text_len)
            output = backbone(None, text_BL.to(device), text_mask_BL.to(device))
            found.append(objective.embed_texts(output.pool(Modality.TEXT)).mean(dim=0))
        return F.normalize(torch.stack(found), dim=-1)
