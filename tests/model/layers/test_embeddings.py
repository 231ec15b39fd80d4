"""Patches by hand."""

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.layers import PatchEmbedding, initialise
from lightning_moevlm.model.layers.embeddings import patchify


def test_patches_are_row_by_row_and_ordered_channel_row_column() -> None:
    # one 2 x 4 image whose value is 100 * channel + 10 * row + column, cut into 2 x 2 patches
    channel, row, column = torch.meshgrid(torch.arange(3), torch.arange(2), torch.arange(4), indexing="ij")
    image = (100 * channel + 10 * row + column).unsqueeze(0)
    patches = patchify(image, 2)
    assert patches.shape == (1, 2, 12)
    assert patches[0, 0].tolist() == [0, 1, 10, 11, 100, 101, 110, 111, 200, 201, 210, 211]
    assert patches[0, 1].tolist() == [2, 3, 12, 13, 102, 103, 112, 113, 202, 203, 212, 213]


def test_hidden_patches_show_nothing_of_their_pixels() -> None:
    embedding = PatchEmbedding(8, 16, 8)
    initialise(embedding, seed=0)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    hidden = torch.tensor([[True, False, False, False]] * 2)
    black = images.clone()
    black[:, :, :8, :8] = 0
    assert torch.equal(embedding(images, hidden), embedding(black, hidden))
    assert not torch.equal(embedding(images, None), embedding(black, None))


def test_patch_size_must_divide_the_image() -> None:
    with pytest.raises(UserError, match="image_size 64 is not a multiple of patch_size 24"):
        PatchEmbedding(8, 64, 24)
