"""Checking a set from end to end: every shard against the manifest, every sample by decoding it.

Unlike a reader, which stops at the first mistake, a check goes on and lists all that it finds.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_moevlm.errors import UserError
from lightning_moevlm.shards.decode import (
    CAPTION_EXTENSION,
    IMAGE_EXTENSIONS,
    decode_caption,
    decode_image,
    undecodable,
)
from lightning_moevlm.shards.faults import Lost
from lightning_moevlm.shards.manifest import SPLITS, Manifest, ShardEntry, Split, read_manifest
from lightning_moevlm.shards.progress import track
from lightning_moevlm.shards.source import RawSample, read_shard
from lightning_moevlm.shards.storage import ShardStorage
from lightning_moevlm.shards.tokenizer import CaptionTokenizer, load_tokenizer

QUANTILES = (0.0, 0.5, 0.95, 1.0)


class SplitCard(NamedTuple):
    """One row of a set's card. Caption lengths are in tokens, without [BOS] and [EOS]."""

    split: Split
    num_shards: int
    num_samples: int
    num_bytes: int
    caption_min: int
    caption_median: int
    caption_p95: int
    caption_max: int


class CheckReport(NamedTuple):
    """What a check found.

    cards: of the splits without problems. problems: one line each; empty if all is well.
    """

    manifest: Manifest
    cards: tuple[SplitCard, ...]
    problems: tuple[str, ...]


def check_set(root: Path) -> CheckReport:
    """Verify shards (size, hash, count), samples (unique keys, every member decodes) and the tokenizer.

    Raises:
        UserError: if the manifest itself cannot be read; everything else is listed in the report.

    """
    manifest = read_manifest(root)
    problems: list[str] = []
    try:
        tokenizer = load_tokenizer(root, manifest.tokenizer)
    except UserError as error:
        return CheckReport(manifest, (), (str(error),))
    if tokenizer.vocab_size != manifest.tokenizer.vocab_size:
        problems.append(f"the tokenizer has {tokenizer.vocab_size} ids, not {manifest.tokenizer.vocab_size}")
    keys: set[str] = set()
    cards = []
    for split in SPLITS:
        shards, lengths, found = manifest.splits[split], list[int](), list[str]()
        for shard in track(shards, len(shards), f"checking {split}"):
            lengths += _check_shard(root, shard, manifest, tokenizer, keys, found)
        if not found and lengths:
            cards.append(_card(split, shards, lengths))
        problems += found
    return CheckReport(manifest, tuple(cards), tuple(problems))


def _check_shard(
    root: Path,
    shard: ShardEntry,
    manifest: Manifest,
    tokenizer: CaptionTokenizer,
    keys: set[str],
    problems: list[str],
) -> list[int]:
    """Return caption lengths; add keys to `keys` and complaints to `problems`."""
    lengths: list[int] = []
    try:
        for sample in read_shard(ShardStorage(str(root)), shard, frozenset(manifest.members)):
            if isinstance(sample, Lost):
                problems.append(sample.message)
                continue
            if sample.key in keys:
                problems.append(f"{sample.key} in shard {shard.file} occurs twice in the set")
            keys.add(sample.key)
            caption = _check_sample(sample, manifest)
            lengths.append(len(tokenizer.ids(caption)))
    except UserError as error:
        problems.append(str(error))
    return lengths


def _check_sample(sample: RawSample, manifest: Manifest) -> str:
    """Decode every member and return the caption ("" if the set has none)."""
    caption = ""
    for extension in manifest.members:
        if extension not in sample.members:
            raise UserError(f"{sample.key} in shard {sample.shard} has no .{extension} member")
        data = sample.members[extension]
        try:
            if extension in IMAGE_EXTENSIONS:
                decode_image(data, extension, manifest.image_size)
            elif extension == CAPTION_EXTENSION:
                caption = decode_caption(data)
            else:
                json.loads(data)
        except ValueError as error:
            raise undecodable(sample.key, sample.shard, extension, error) from error
    if CAPTION_EXTENSION in manifest.members and not caption:
        raise UserError(f"{sample.key} in shard {sample.shard} has an empty caption")
    return caption


def _card(split: Split, shards: tuple[ShardEntry, ...], lengths: list[int]) -> SplitCard:
    least, median, p95, most = (int(q) for q in np.quantile(lengths, QUANTILES, method="higher"))
    num_samples, num_bytes = sum(s.num_samples for s in shards), sum(s.num_bytes for s in shards)
    return SplitCard(split, len(shards), num_samples, num_bytes, least, median, p95, most)
