"""Fits a patch codebook: mini-batch k-means over the training shards of a set."""

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.common.progress import track
from lightning_moevlm.contracts.codebook import Codebook, standardise_patches
from lightning_moevlm.data.images.decode import IMAGE_EXTENSIONS
from lightning_moevlm.data.load.shard_loader import ShardLoader
from lightning_moevlm.data.read.collate import Collate
from lightning_moevlm.data.read.evaluation_reader import FixedReader
from lightning_moevlm.data.read.sample_order import Rank
from lightning_moevlm.data.read.source_stream import OpenSource
from lightning_moevlm.data.storage.shard_storage import ShardStorage

BATCH_SIZE = 256
FLAT = 0.5
"""Standardised patches have a deviation of 1; patches with less than this were uniform grey."""


def fit_codebook(storage: ShardStorage, num_codes: int, patch_size: int, seed: int, max_samples: int) -> Codebook:
    """Fit `num_codes` centres on the patches of up to `max_samples` training images.

    The same set and seed give the same codebook on one machine. Uniform grey patches standardise to zero. They get one
    centre, the zero vector (code 0), so that they do not crowd out the others.

    Raises:
        UserError: if the set is invalid, or has too few patches for so many codes.
    """
    check_number("num_codes", num_codes, least=2)
    manifest = storage.read_manifest()
    images = [member for member in manifest.members if member in IMAGE_EXTENSIONS]
    if not images:
        raise UserError(f"{storage} has no images, so there are no patches for a codebook")
    collate = Collate(images, storage.read_tokenizer(manifest.tokenizer), manifest.image_size, max_text_len=2)
    source = OpenSource(manifest.name, storage, manifest.splits["train"], collate, manifest.layout)
    reader = FixedReader((source,), BATCH_SIZE, Rank(0, 1), num_streams=1, tolerant=False)
    loader = ShardLoader(reader, num_workers=0)
    num_batches = min(len(loader), -(-max_samples // BATCH_SIZE))
    found: list[Tensor] = []
    for _, batch in zip(range(num_batches), track(loader, num_batches, "cutting patches"), strict=False):
        assert batch.images_BRYX is not None
        found.append(standardise_patches(batch.images_BRYX, patch_size).flatten(0, 1))
    patches_PQ = torch.cat(found)
    structured_PQ = patches_PQ[patches_PQ.std(-1, correction=0) > FLAT]
    if len(structured_PQ) < num_codes:
        raise UserError(
            f"{len(structured_PQ)} patches with structure are too few for {num_codes} codes; "
            "lower num_codes or patch_size, or build a larger set"
        )
    kmeans = MiniBatchKMeans(num_codes - 1, batch_size=2048, random_state=seed, n_init=1, max_iter=20)
    kmeans.fit(structured_PQ.numpy())
    centres_CQ = torch.from_numpy(kmeans.cluster_centers_).to(torch.float32)
    return Codebook(torch.cat([torch.zeros_like(centres_CQ[:1]), centres_CQ]), patch_size, manifest.digest)
