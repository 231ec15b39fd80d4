"""Embeds pixels and token ids to model width."""

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.model.initial_weights import Module


class PatchEmbedding(Module):
    """Cuts an image into square patches and projects each; masked patches become one learned vector.

    Args:
        dim: model width D.
        image_size: height and width in pixels; a multiple of patch_size.
        patch_size: height and width of a patch in pixels.
        is_frozen: leave the projection at its random start. Gradient spikes of self-supervised vision transformers
            begin there, and a random projection serves as well (MoCo v3, arXiv 2104.02057, section 4).
    """

    def __init__(self, dim: int, image_size: int, patch_size: int, is_frozen: bool = False) -> None:
        super().__init__()
        if image_size % patch_size:
            raise UserError(f"image_size {image_size} is not a multiple of patch_size {patch_size}: change one of them")
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_patches = (image_size // patch_size) ** 2
        self.project = (_RandomLinear if is_frozen else nn.Linear)(3 * patch_size**2, dim)
        self.position_PD = nn.Parameter(torch.empty(self.num_patches, dim))
        self.modality_D = nn.Parameter(torch.empty(dim))
        self.mask_D = nn.Parameter(torch.empty(dim))

    def forward(self, images_BRYX: Tensor, mask_BP: Tensor | None) -> Tensor:
        """Embed uint8 images; mask_BP: bool, True where the patch is hidden. Returns (B, P, D)."""
        patches_BPQ = patchify(images_BRYX, self.patch_size).to(self.project.weight.dtype) / 127.5 - 1.0
        patches_BPD = self.project(patches_BPQ)
        if mask_BP is not None:
            patches_BPD = torch.where(mask_BP.unsqueeze(-1), self.mask_D.to(patches_BPD.dtype), patches_BPD)
        return patches_BPD + self.position_PD + self.modality_D

    def idle_parameters(self) -> float:
        """None."""
        return 0.0

    def costs(self) -> Costs:
        """Costs of one image."""
        pixels = self.num_patches * self.project.in_features
        return Costs(embeddings=2.0 * pixels * self.project.out_features, kept_by_products=float(pixels))


class _RandomLinear(nn.Linear):
    """A linear layer that is not trained; `initialise` draws it all the same."""

    starts_frozen = True

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.requires_grad_(False)


class TextEmbedding(Module):
    """Token and position vectors.

    Args:
        dim: model width D.
        vocab_size: V.
        max_text_len: longest text L.
    """

    def __init__(self, dim: int, vocab_size: int, max_text_len: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, dim)
        self.position_LD = nn.Parameter(torch.empty(max_text_len, dim))
        self.modality_D = nn.Parameter(torch.empty(dim))

    def forward(self, text_BL: Tensor, position_BL: Tensor | None = None) -> Tensor:
        """Embed int64 token ids to (B, L, D); position_BL: of each in its text, None counts from 0."""
        position = self.position_LD[: text_BL.shape[1]] if position_BL is None else self.position_LD[position_BL]
        return self.token(text_BL) + position + self.modality_D


def patchify(images_BRYX: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, row by row: (B, P, Q) with Q ordered channel, row, column; dtype unchanged."""
    batch, channels, height, width = images_BRYX.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images_BRYX.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)
