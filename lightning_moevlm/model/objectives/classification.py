"""Classification of images: a linear layer on the mean of their features (as ViT is fine-tuned, arXiv 2010.11929, 3.2).

    loss = cross-entropy of the true class, mean over the images that have one

It fine-tunes a model that `model.init_from` starts from; without that it is the same model trained from scratch.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.answer_list import read_classes
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.step_records import (
    BatchSize,
    ObjectiveOutput,
    PlanSize,
    Predictions,
    SampleLosses,
    Term,
)
from lightning_moevlm.model.backbones import Backbone, BackboneSpec
from lightning_moevlm.model.objectives.draws import Draws
from lightning_moevlm.model.objectives.objective import Objective
from lightning_moevlm.model.objectives.targets.image_targets import cross_entropy
from lightning_moevlm.model.precision import region

TERM = "class"


class Classification(Objective):
    """Names the class of an image.

    Args:
        spec: the backbone's dimensions.
        classes: file of `moevlm data answers --annotation FIELD`, or one with the name of a class per line.

    Raises:
        UserError: the file cannot be used.
    """

    def __init__(self, spec: BackboneSpec, classes: str) -> None:
        super().__init__()
        self.classes = read_classes(Path(classes))
        self.num_patches = spec.num_patches
        self.norm = nn.LayerNorm(spec.dim)
        self.out = nn.Linear(spec.dim, len(self.classes.names))
        self.num_classes = {TERM: len(self.classes.names)}

    def can_use(self, batch: Batch) -> bool:
        """Return whether a batch holds images whose classes are read."""
        return batch.images_BRYX is not None and batch.answers is not None

    def forward(self, backbone: Backbone, batch: Batch, draws: Draws) -> ObjectiveOutput:
        """Classify the images of the batch; those without a class are encoded and left out of the loss."""
        if batch.images_BRYX is None or batch.answers is None:
            raise UserError(
                "Classification needs images with their class, and this batch has none: choose a set with classes, and "
                "set data.annotation to the field that names them, or to cls"
            )
        output = backbone(batch.images_BRYX)
        labels = self._labels(batch)
        known = [(row, self.classes.number(label)) for row, label in enumerate(labels) if label is not None]
        known_M2 = torch.tensor(known, dtype=torch.int64).view(-1, 2).to(batch.device, non_blocking=True)
        rows_M, target_M = known_M2.unbind(1)
        with region(self.precision, "heads", output.tokens_BSD.device.type) as cast:
            logits_MC: Tensor = self.out(self.norm(cast(output.pool(Modality.IMAGE)[rows_M])))
        with region(self.precision, "losses", logits_MC.device.type) as cast:
            loss = cross_entropy(cast(logits_MC), target_M)
        predictions = Predictions(logits_MC.detach().argmax(dim=-1), target_M)
        of_samples = {}
        if not self.training and loss.loss_M is not None:
            right_M = (predictions.predicted_M == predictions.target_M).float()
            of_samples[TERM] = SampleLosses(batch.image_keys, rows_M, loss.loss_M.detach(), right_M)
        return ObjectiveOutput(
            {TERM: Term(loss.mean, 1.0, len(target_M))},
            {TERM: predictions},
            output.plans,
            output.num_tokens,
            output.attention,
            {} if loss.log_partition_M is None else {TERM: loss.log_partition_M},
            of_samples=of_samples,
        )

    def size(self, batch: Batch) -> BatchSize:
        """Return the number of images with a class, and tokens of their pass."""
        images = torch.full((), len(batch.image_keys), device=batch.device)
        labels = self._labels(batch)
        labelled = images if batch.answers is None else torch.full_like(images, len(labels) - labels.count(None))
        return BatchSize({TERM: labelled}, {"image": PlanSize.of_pass(images, None, self.num_patches)})

    def head_costs(self, predictions: Mapping[str, int]) -> Costs:
        """2 D C FLOPs for each image with a class."""
        images, (classes, dim) = sum(predictions.values()), self.out.weight.shape
        return Costs(
            heads=2.0 * images * dim * classes,
            kept_by_norms=float(images * (dim + 2 * classes)),
            kept_by_products=float(images * dim),
        )

    def _labels(self, batch: Batch) -> list[str | None]:
        if batch.answers is None:
            return []
        return [given[0] if given else None for given in batch.answers.given[: len(batch.image_keys)]]
