"""A visual codebook: k-means centres of image patches, so that masked image patches have discrete targets.

A patch is first standardised by its own mean and deviation, so codes describe structure and not brightness.
The codebook is fitted on the training shards of a set, lies beside them, and holds the manifest's digest.

Layout: patches are row-major over the image; within a patch the order is (channel, row, column).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_moevlm.common.errors import UserError

EPS = 1e-6
CENTROIDS = "centroids_CQ"
KIND = "moevlm-codebook/1"


@dataclass(frozen=True)
class Codebook:
    """Centres of standardised patches.

    centroids_CQ: fp32.
    patch_size: pixels per side.
    manifest_digest: digest of the set that they were fitted on.
    """

    centroids_CQ: Tensor
    patch_size: int
    manifest_digest: str

    @property
    def num_codes(self) -> int:
        """C."""
        return self.centroids_CQ.shape[0]


def nearest_codes(images_BRYX: Tensor, centroids_CQ: Tensor, patch_size: int) -> Tensor:
    """Return the nearest code of every patch, int64 (B, P); images uint8 RGB, centroids fp32."""
    patches_BPQ = standardise_patches(images_BRYX, patch_size)
    centroids_CQ = centroids_CQ.to(patches_BPQ.device)
    # |x - c|^2 without |x|^2, which is the same for every c
    distance_BPC = centroids_CQ.square().sum(1) - 2 * patches_BPQ @ centroids_CQ.T
    return distance_BPC.argmin(-1)


def standardise_patches(images_BRYX: Tensor, patch_size: int) -> Tensor:
    """Cut images (uint8 RGB) into patches of zero mean and unit deviation: fp32 (B, P, Q).

    Pixels are scaled to [0, 1]; a patch x becomes (x - mean(x)) / (std(x) + EPS), std being the population's.

    Raises:
        UserError: if the patch size does not divide the image's sides.

    """
    height, width = images_BRYX.shape[2:]
    if height % patch_size or width % patch_size:
        raise UserError(
            f"patch_size is {patch_size}, but must divide the image size {height}x{width}: choose a divisor of "
            f"{math.gcd(height, width)}"
        )
    pixels_BRYX = images_BRYX.to(torch.float32) / 255
    patches_BPQ = F.unfold(pixels_BRYX, patch_size, stride=patch_size).transpose(1, 2)
    centred_BPQ = patches_BPQ - patches_BPQ.mean(-1, keepdim=True)
    return centred_BPQ / (patches_BPQ.std(-1, keepdim=True, correction=0) + EPS)


def codebook_file(num_codes: int, patch_size: int) -> str:
    """Return the name of the file beside the shards."""
    return f"codebook-{num_codes}x{patch_size}.safetensors"


def save_codebook(codebook: Codebook, path: Path) -> None:
    """Write a codebook as safetensors, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    metadata = {
        "kind": KIND,
        "patch_size": str(codebook.patch_size),
        "manifest_digest": codebook.manifest_digest,
    }
    save_file({CENTROIDS: codebook.centroids_CQ.contiguous()}, unfinished, metadata)
    unfinished.replace(path)


def load_codebook(path: Path) -> Codebook:
    """Load a codebook.

    Raises:
        UserError: if the file is missing (with the command that makes one) or is not a codebook.

    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; make it with `moevlm data codebook {path.parent}`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            if metadata.get("kind") != KIND or CENTROIDS not in names:
                raise UserError(f"{path} is safetensors, but not a codebook; make one with `moevlm data codebook`")
            centroids_CQ = file.get_tensor(CENTROIDS)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file ({error}); make one with `moevlm data codebook`") from None
    patch_size = int(metadata["patch_size"])
    if centroids_CQ.dim() != 2 or centroids_CQ.shape[1] != 3 * patch_size**2:
        raise UserError(
            f"{path}: centroids have shape {tuple(centroids_CQ.shape)}, "
            f"expected (codes, {3 * patch_size**2}); fit it again"
        )
    return Codebook(centroids_CQ.to(torch.float32), patch_size, metadata["manifest_digest"])
