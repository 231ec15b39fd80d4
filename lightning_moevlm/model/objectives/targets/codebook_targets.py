"""Discrete codes from a patch codebook fitted on the shards by k-means.

    code(patch) = argmin_c |standardise(patch) - centroid_c|^2

`moevlm data codebook` fits it. A cheap, hub-free stand-in for the VQ-KD codes of BEiT v2 (arXiv 2208.06366), which
VL-MoE predicts; use `VQCheckpointTargets` for the real ones.
"""

from pathlib import Path

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.codebook import load_codebook, nearest_codes
from lightning_moevlm.model.backbones import BackboneSpec
from lightning_moevlm.model.objectives.targets.image_targets import Codes


class CodebookTargets(Codes):
    """Index of the nearest centroid.

    Args:
        spec: the backbone's dimensions.
        path: codebook file written by `moevlm data codebook`.

    Raises:
        UserError: the file is missing, broken, or was fitted for another patch size.
    """

    centroids_CQ: Tensor

    def __init__(self, spec: BackboneSpec, path: str) -> None:
        super().__init__()
        codebook = load_codebook(Path(path))
        if codebook.patch_size != spec.patch_size:
            raise UserError(
                f"{path} was fitted on patches of {codebook.patch_size} px, the model cuts {spec.patch_size} px: "
                f"run moevlm data codebook with --patch-size {spec.patch_size}"
            )
        self.patch_size = spec.patch_size
        self.num_classes = codebook.centroids_CQ.shape[0]
        self.output_dim = self.num_classes
        self.register_buffer("centroids_CQ", codebook.centroids_CQ, persistent=False)

    @torch.no_grad()
    def forward(self, images_BRYX: Tensor) -> Tensor:
        """Return (B, P) int64 codes."""
        return nearest_codes(images_BRYX, self.centroids_CQ, self.patch_size)
