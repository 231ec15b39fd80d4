"""Judges frozen image features by the classes that can be read off them (`model/metrics/tasks/probes.py`)."""

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.metrics.gather import gather_objects
from lightning_moevlm.model.metrics.tasks.class_scores import count_hits, score_classes
from lightning_moevlm.model.metrics.tasks.probes import linear_probe, nearest_neighbours
from lightning_moevlm.training.callbacks.tasks.parts import HeldOutTask, require_labels
from lightning_moevlm.training.vision_language_module import VisionLanguageModule

_Labelled = dict[str, tuple[Tensor, str]]  # feature and class by key of the sample


class LabelProbes(HeldOutTask):
    """Logs accuracies of a linear probe and of k nearest neighbours, beside chance and the most frequent class.

    Features are averages over patches, of the training split and of the held-out one. The class of a sample is its
    annotation (`data.annotation`); samples without one are left out. Each validation reads the training split once
    more, so validate rarely.

    Args:
        k: neighbours that vote.
        temperature: of their votes.
        max_samples: of the training split on each rank, from its beginning; null takes all.

    Raises:
        UserError: an argument out of range, or data without classes.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07, max_samples: int | None = None) -> None:
        check_number("k of LabelProbes", k, least=1)
        check_number("temperature of LabelProbes", temperature, above=0)
        if max_samples is not None:
            check_number("max_samples of LabelProbes", max_samples, least=2)
        self.k = k
        self.temperature = temperature
        self.max_samples = max_samples
        self._held: _Labelled = {}

    def check(self, trainer: Trainer, module: VisionLanguageModule) -> None:
        """Refuse data without classes."""
        require_labels(trainer, "LabelProbes")

    def add(self, trainer: Trainer, module: VisionLanguageModule, batch: Batch) -> None:
        """Keep the features of a batch."""
        self._held |= _embed(trainer, module, batch)

    def compute(self, trainer: Trainer, module: VisionLanguageModule, stage: str) -> dict[str, float]:
        """Embed the training split, fit and score."""
        train: _Labelled = {}
        for batch in require_labels(trainer, "LabelProbes").ordered_train_dataloader():
            train |= _embed(trainer, module, trainer.strategy.batch_to_device(batch))
            if self.max_samples is not None and len(train) >= self.max_samples:
                break
        own, self._held = (train, self._held), {}
        everyone = gather_objects(own)
        train, held = (_join(parts) for parts in zip(*everyone, strict=True))
        classes = sorted({label for _, label in train.values()})
        if len(classes) < 2 or not held:
            raise UserError(
                f"LabelProbes found {len(classes)} classes in training images and {len(held)} held-out images with a "
                "class: it needs two classes and one image; set data.annotation to a field that tells images apart"
            )
        values = self._score(train, held, classes, stage) if trainer.is_global_zero else {}
        return gather_objects(values)[0]  # one rank fits: all must agree on what callbacks monitor

    def _score(self, train: _Labelled, held: _Labelled, classes: list[str], stage: str) -> dict[str, float]:
        number = {label: index for index, label in enumerate(classes)}
        train_ND, class_N = _table(train, number)
        held_MD, class_M = _table(held, number)
        scored = {
            metric_keys.LINEAR_PROBE: linear_probe(train_ND, class_N, held_MD, len(classes)),
            metric_keys.KNN: nearest_neighbours(train_ND, class_N, held_MD, len(classes), self.k, self.temperature),
        }
        values: dict[str, float] = {}
        for family, scores_MC in scored.items():
            hits = count_hits(scores_MC, class_M)
            values |= score_classes(hits, len(classes), stage, family, metric_keys.PROBE_BASELINE)
        return values


def _embed(trainer: Trainer, module: VisionLanguageModule, batch: Batch) -> _Labelled:
    if batch.images_BRYX is None or batch.answers is None:
        return {}
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        feature_BD = module.backbone(batch.images_BRYX).pool(Modality.IMAGE).float().cpu()
    labels = batch.answers.given[: len(feature_BD)]
    return {
        key: (feature_D, given[0])
        for key, feature_D, given in zip(batch.image_keys, feature_BD, labels, strict=True)
        if given
    }


def _join(parts: tuple[_Labelled, ...]) -> _Labelled:
    """Return the samples of all ranks in the order of their keys, which no batch size or rank changes."""
    return dict(sorted((key, value) for part in parts for key, value in part.items()))


def _table(samples: _Labelled, number: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Return features and classes; a class that training lacks is -1."""
    features = torch.stack([feature_D for feature_D, _ in samples.values()])
    return features, torch.tensor([number.get(label, -1) for _, label in samples.values()])
