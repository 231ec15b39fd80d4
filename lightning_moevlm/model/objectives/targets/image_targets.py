"""Targets of masked image patches: pixels or codes."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.contracts.step_records import Predictions
from lightning_moevlm.model.backbones import BackboneSpec
from lightning_moevlm.model.layers.embeddings import patchify


class TargetLoss(NamedTuple):
    """The loss over M masked positions.

    mean: a scalar fp32 tensor.
    log_partition_M: logsumexp of class logits, or None.
    loss_M: loss of each position; None where only the mean is known.
    """

    mean: Tensor
    log_partition_M: Tensor | None
    loss_M: Tensor | None = None


class ImageTargets(nn.Module, ABC):
    """Targets of masked patches; the first constructor argument is the backbone's spec.

    output_dim: numbers that the head predicts per patch. num_classes: number of codes, None for continuous targets.
    """

    output_dim: int
    num_classes: int | None

    @abstractmethod
    def forward(self, images_BRYX: Tensor) -> Tensor:
        """Return targets per patch of uint8 images: (B, P) int64 codes or (B, P, output_dim) fp32 values."""

    @abstractmethod
    def loss(self, output_MO: Tensor, target_M: Tensor) -> TargetLoss:
        """Return the loss over M masked patches, in the dtype of the output."""

    def predictions(self, output_MO: Tensor, target_M: Tensor) -> Predictions | None:
        """Return predicted and true codes, or None for continuous targets."""
        if self.num_classes is None:
            return None
        return Predictions(output_MO.argmax(dim=-1), target_M)


class PixelTargets(ImageTargets):
    """Pixels, each patch standardised by its own mean and deviation (MAE, arXiv 2111.06377, section 4.1).

    Loss: mean squared error; 1.0 is the loss of predicting every patch's mean.

    Args:
        spec: the backbone's dimensions.
    """

    num_classes = None

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.patch_size = spec.patch_size
        self.output_dim = 3 * spec.patch_size**2

    def forward(self, images_BRYX: Tensor) -> Tensor:
        """Return (B, P, Q) fp32; a patch of one colour becomes zeros."""
        patches_BPQ = patchify(images_BRYX, self.patch_size).float() / 255.0
        return standardise(patches_BPQ)

    def loss(self, output_MO: Tensor, target_M: Tensor) -> TargetLoss:
        """Return the mean squared error; that of each patch only where no gradient is asked, since it costs as much."""
        target_M = target_M.to(output_MO.dtype)
        of_each = None if output_MO.requires_grad else F.mse_loss(output_MO, target_M, reduction="none").mean(dim=-1)
        return TargetLoss(F.mse_loss(output_MO, target_M), None, of_each)


class Codes(ImageTargets, ABC):
    """Discrete targets: cross-entropy over codes."""

    num_classes: int

    def loss(self, output_MO: Tensor, target_M: Tensor) -> TargetLoss:
        """Return the cross-entropy in nats."""
        return cross_entropy(output_MO, target_M)


def cross_entropy(logits_MV: Tensor, target_M: Tensor) -> TargetLoss:
    """Return the mean cross-entropy in nats; 0 instead of NaN where nothing was masked.

    Cross-entropy is logsumexp less the target's logit, so the logsumexp costs one look-up and not another softmax.
    """
    loss_M = F.cross_entropy(logits_MV, target_M, reduction="none")
    target_logit_M = logits_MV.gather(-1, target_M.unsqueeze(-1)).squeeze(-1)
    return TargetLoss(loss_M.sum() / max(target_M.shape[0], 1), loss_M + target_logit_M, loss_M)


def standardise(patches_BPQ: Tensor) -> Tensor:
    """Subtract each patch's mean and divide by its standard deviation (epsilon 1e-6 under the root)."""
    variance, mean = torch.var_mean(patches_BPQ, dim=-1, keepdim=True, correction=0)
    return (patches_BPQ - mean) / (variance + 1e-6).sqrt()
