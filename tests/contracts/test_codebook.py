from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.codebook import (
    Codebook,
    load_codebook,
    nearest_codes,
    save_codebook,
    standardise_patches,
)
from lightning_moevlm.data.fit_codebook import fit_codebook
from lightning_moevlm.data.format.manifest import read_manifest
from lightning_moevlm.data.storage.shard_storage import ShardStorage


def test_patch_layout_by_hand() -> None:
    # 4x4 image, patches of 2: pixel value = 100 * channel + 10 * row + column
    image_RYX = torch.tensor([[[100 * r + 10 * y + x for x in range(4)] for y in range(4)] for r in range(3)])
    # 200 + 33 = 233 still fits uint8; the patch right of the first begins at row 0, column 2
    raw_BPQ = standardise_patches(image_RYX.to(torch.uint8)[None], 2)
    second = torch.tensor([2.0, 3, 12, 13, 102, 103, 112, 113, 202, 203, 212, 213]) / 255
    expected = (second - second.mean()) / (second.std(correction=0) + 1e-6)
    assert raw_BPQ.shape == (1, 4, 12)
    torch.testing.assert_close(raw_BPQ[0, 1], expected, rtol=1e-4, atol=1e-4)
    # third patch: row 2, column 0 -> patches are row-major
    third = torch.tensor([20.0, 21, 30, 31, 120, 121, 130, 131, 220, 221, 230, 231]) / 255
    expected = (third - third.mean()) / (third.std(correction=0) + 1e-6)
    torch.testing.assert_close(raw_BPQ[0, 2], expected, rtol=1e-4, atol=1e-4)


def test_standardised_patches_have_zero_mean_and_unit_deviation_and_grey_ones_vanish() -> None:
    torch.manual_seed(0)
    noise_BRYX = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    patches_BPQ = standardise_patches(noise_BRYX, 8)
    torch.testing.assert_close(patches_BPQ.mean(-1), torch.zeros(2, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(patches_BPQ.std(-1, correction=0), torch.ones(2, 4), rtol=0, atol=1e-4)
    grey_BRYX = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    assert standardise_patches(grey_BRYX, 8).abs().max() < 0.1


def test_codes_are_the_nearest_centres() -> None:
    torch.manual_seed(0)
    codebook = Codebook(torch.randn(7, 3 * 8 * 8), 8, "d")
    images_BRYX = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    patches_BPQ = standardise_patches(images_BRYX, 8)
    slow = [
        [min(range(7), key=lambda c, x=x: float((x - codebook.centroids_CQ[c]).square().sum())) for x in image]
        for image in patches_BPQ
    ]
    assert nearest_codes(images_BRYX, codebook.centroids_CQ, codebook.patch_size).tolist() == slow


def test_fit_save_load(scenes_root: Path, tmp_path: Path) -> None:
    fitted = fit_codebook(ShardStorage(str(scenes_root)), 32, 8, seed=0, max_samples=100)
    assert fitted.centroids_CQ.shape == (32, 192) and fitted.centroids_CQ.dtype == torch.float32
    assert fitted.manifest_digest == read_manifest(scenes_root).digest
    assert torch.equal(fitted.centroids_CQ, fit_codebook(ShardStorage(str(scenes_root)), 32, 8, 0, 100).centroids_CQ)
    save_codebook(fitted, tmp_path / "c.safetensors")
    loaded = load_codebook(tmp_path / "c.safetensors")
    assert torch.equal(loaded.centroids_CQ, fitted.centroids_CQ)
    assert (loaded.patch_size, loaded.manifest_digest, loaded.num_codes) == (8, fitted.manifest_digest, 32)
    grey_BRYX = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    assert nearest_codes(grey_BRYX, loaded.centroids_CQ, loaded.patch_size).unique().tolist() == [0]


def test_codes_describe_images_better_than_one_centre(scenes_root: Path) -> None:
    from lightning_moevlm.data.datamodule import ShardDataModule

    codebook = fit_codebook(ShardStorage(str(scenes_root)), 64, 8, seed=0, max_samples=200)
    data = ShardDataModule(str(scenes_root), 12, 32, 16, 400)
    images_BRYX = next(iter(data.val_dataloader())).images_BRYX
    assert images_BRYX is not None
    patches_PQ = standardise_patches(images_BRYX, 8).flatten(0, 1)
    codes_P = nearest_codes(images_BRYX, codebook.centroids_CQ, codebook.patch_size).flatten()
    error = (patches_PQ - codebook.centroids_CQ[codes_P]).square().mean()
    assert error < 0.6 * patches_PQ.square().mean()
    assert len(codes_P.unique()) > 16


def test_mistakes_are_explained(scenes_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"moevlm data codebook {tmp_path}`"):
        load_codebook(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(UserError, match="is not a safetensors file"):
        load_codebook(tmp_path / "text")
    save_file({"w": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(UserError, match="not a codebook"):
        load_codebook(tmp_path / "weights")
    save_codebook(Codebook(torch.zeros(4, 100), 8, "d"), tmp_path / "odd")
    with pytest.raises(UserError, match=r"\(4, 100\), expected \(codes, 192\)"):
        load_codebook(tmp_path / "odd")
    with pytest.raises(UserError, match="must divide"):
        fit_codebook(ShardStorage(str(scenes_root)), 8, 7, 0, 100)
    with pytest.raises(UserError, match="too few"):
        fit_codebook(ShardStorage(str(scenes_root)), 5000, 8, 0, 100)
    with pytest.raises(UserError, match="num_codes is 1: choose 2 or more"):
        fit_codebook(ShardStorage(str(scenes_root)), 1, 8, 0, 100)
