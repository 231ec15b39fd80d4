"""Codes of image patches before the model sees them, for hash routing.

    without a codebook: the signs of NUM_BITS fixed random projections of the standardised patch, read as a number,
                        so that similar patches tend to share a code (locality-sensitive hashing, Charikar 2002)
    with a codebook:    the nearest of its k-means centres (`moevlm data codebook`)

A hidden patch has the code -1, so that routing does not reveal the target.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.codebook import load_codebook, nearest_codes, standardise_patches
from lightning_moevlm.contracts.model_card import Costs

HIDDEN = -1
NUM_BITS = 10


class PatchCodes(nn.Module):
    """Codes of image patches; nothing is learned and nothing is in a checkpoint.

    Args:
        patch_size: pixels per side.
        codebook: file of `moevlm data codebook`; null takes random projections.

    Raises:
        UserError: a codebook for other patches, or a file that is missing or broken.
    """

    projection_QN: Tensor

    def __init__(self, patch_size: int, codebook: str | None = None) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.codebook = None if codebook is None else load_codebook(Path(codebook))
        if self.codebook is not None and self.codebook.patch_size != patch_size:
            raise UserError(
                f"codebook {codebook} is for patches of {self.codebook.patch_size} px, the model's have {patch_size}: "
                "fit one with `moevlm data codebook --patch-size`, or change patch_size"
            )
        generator = torch.Generator("cpu").manual_seed(0)
        projection_QN = torch.randn(3 * patch_size**2, NUM_BITS, generator=generator, dtype=torch.float32, device="cpu")
        self.register_buffer("projection_QN", projection_QN, persistent=False)

    def costs(self, num_patches: int) -> Costs:
        """Products of patches with projections or centres; they count as routing, and nothing is kept."""
        pixels, bits = self.projection_QN.shape
        return Costs(
            router=2.0 * num_patches * pixels * (bits if self.codebook is None else len(self.codebook.centroids_CQ))
        )

    @torch.no_grad()
    def forward(self, images_BRYX: Tensor, hidden_BP: Tensor | None) -> Tensor:
        """Return int64 (B, P); images are uint8, hidden_BP is True where the patch is masked."""
        if self.codebook is not None:
            code_BP = nearest_codes(images_BRYX, self.codebook.centroids_CQ, self.patch_size)
        else:
            patches_BPQ = standardise_patches(images_BRYX, self.patch_size)
            bits_BPN = (patches_BPQ @ self.projection_QN.to(patches_BPQ.dtype) > 0).to(torch.int64)
            code_BP = (bits_BPN << torch.arange(NUM_BITS, device=bits_BPN.device)).sum(dim=-1)
        return code_BP if hidden_BP is None else torch.where(hidden_BP, HIDDEN, code_BP)
