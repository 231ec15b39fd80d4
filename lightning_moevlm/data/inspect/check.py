"""Checking a set from end to end: every shard against the manifest, every sample by decoding it.

Unlike a reader, which stops at the first mistake, a check goes on and lists all that it finds. On the way it gathers
the set's card: counts, sizes, lengths, and images that occur more than once.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.progress import track
from lightning_moevlm.data.format.faults import Cause, Lost, decode_fault
from lightning_moevlm.data.format.manifest import SPLITS, Manifest, Split
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard
from lightning_moevlm.data.images.decode import (
    IMAGE_EXTENSIONS,
    ImageTooLargeError,
    decode_image,
)
from lightning_moevlm.data.inspect.thumbnails import modality_of, read_image_size
from lightning_moevlm.data.storage.next_shard import ShardPrefetcher
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.captions import CAPTION_EXTENSION, find_captions
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer

QUANTILES = (0.0, 0.5, 0.95, 1.0)
_DECODED_SIZE = 8  # pixels; small, since only whether it can be decoded matters
TEXT_LENGTHS = (24, 40, 64, 128)
"""Of `data.max_text_len`: those of the shipped configurations, and more; a check tells how many captions each cuts."""
_FRAME = 2  # [BOS] and [EOS]
_DIGEST_BYTES = 16  # of sha256, kept per image: enough to tell any number of images apart


class SplitCard(NamedTuple):
    """One row of a set's card, over samples without problems.

    caption_*: tokens of a sample's longest caption, without [BOS] and [EOS]; 0 in a set without captions. cut: share of
    the samples of which a caption loses its end, by `data.max_text_len`. side_*: pixels, min, median and 95 % of the
    shorter side and the largest longer side; 0 in a set without images. duplicates_within: samples whose image (in
    a set of texts: caption) is byte for byte one that occurred before in the split; duplicates_across: not in this
    split, but in one before it.
    """

    split: Split
    num_shards: int
    num_samples: int
    num_bytes: int
    modality: str
    caption_min: int
    caption_median: int
    caption_p95: int
    caption_max: int
    cut: dict[int, float]
    side_min: int
    side_median: int
    side_p95: int
    side_max: int
    num_questions: int
    duplicates_within: int
    duplicates_across: int


class CheckReport(NamedTuple):
    """What a check found.

    cards: one per split that has a sample without problems. sizes: how many images have which (width, height), the
    most frequent first. faults: lost samples by cause. problems: one line each; empty if all is well.
    """

    manifest: Manifest
    cards: tuple[SplitCard, ...]
    sizes: tuple[tuple[tuple[int, int], int], ...]
    faults: dict[Cause, int]
    problems: tuple[str, ...]


class _ProblemError(Exception):
    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class _Found(NamedTuple):
    """What is in one good sample. size: (width, height). num_tokens, size: None where the set has no such member."""

    num_tokens: int | None
    size: tuple[int, int] | None
    num_questions: int


def check_set(storage: ShardStorage) -> CheckReport:
    """Verify shards (size, hash, count), samples (unique keys, every member decodes) and the tokenizer.

    Raises:
        UserError: if the manifest itself cannot be read; everything else is listed in the report.

    """
    manifest = storage.read_manifest()
    try:
        tokenizer = storage.read_tokenizer(manifest.tokenizer)
    except UserError as error:
        return CheckReport(manifest, (), (), {}, (str(error),))
    check = _Check(storage, manifest, tokenizer)
    if tokenizer.vocab_size != manifest.tokenizer.vocab_size:
        check.problems.append(f"the tokenizer has {tokenizer.vocab_size} ids, not {manifest.tokenizer.vocab_size}")
    empty = [split for split in SPLITS if not manifest.num_samples(split)]
    check.problems.extend(f"the {split} split of {storage} is empty; make the set anew" for split in empty)
    cards = tuple(card for split in SPLITS if (card := check.split(split)) is not None)
    sizes = tuple(sorted(check.sizes.items(), key=lambda entry: (-entry[1], entry[0])))
    return CheckReport(manifest, cards, sizes, dict(sorted(check.faults.items())), tuple(check.problems))


class _Check:
    """A check on its way through the splits, and what it has met so far."""

    def __init__(self, storage: ShardStorage, manifest: Manifest, tokenizer: CaptionTokenizer) -> None:
        self._storage = storage
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._keys: set[str] = set()
        self._shown: dict[bytes, set[Split]] = {}
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.faults: Counter[Cause] = Counter()
        self.problems: list[str] = []

    def split(self, split: Split) -> SplitCard | None:
        """Check one split; None if it has no good sample."""
        shards, wanted = self._manifest.splits[split], frozenset(self._manifest.members)
        found: list[_Found] = []
        within, across = 0, 0
        for sample in self._samples(split, wanted):
            if isinstance(sample, Lost):
                self._report(sample.cause, sample.message, sample.num_samples)
                continue
            try:
                found.append(self._sample(sample))
            except _ProblemError as problem:
                self._report(problem.cause, str(problem))
                continue
            splits = self._shown.setdefault(self._identity(sample), set())
            within += split in splits
            across += bool(splits) and split not in splits
            splits.add(split)
        if not found:
            return None
        self.sizes.update(entry.size for entry in found if entry.size is not None)
        sizes = [entry.size for entry in found if entry.size is not None]
        lengths = [entry.num_tokens for entry in found if entry.num_tokens is not None]
        return SplitCard(
            split,
            len(shards),
            len(found),
            sum(shard.num_bytes for shard in shards),
            modality_of(self._manifest),
            *_quantiles(lengths),
            {limit: _share_above(limit - _FRAME, lengths) for limit in TEXT_LENGTHS if lengths},
            *_quantiles([min(size) for size in sizes])[:3],
            max((max(size) for size in sizes), default=0),
            sum(entry.num_questions for entry in found),
            within,
            across,
        )

    def _samples(self, split: Split, wanted: frozenset[str]) -> Iterator[RawSample | Lost]:
        shards = self._manifest.splits[split]
        with ShardPrefetcher(self._storage, shards) as ahead:
            for shard in track(shards, len(shards), f"checking {split}"):
                yield from read_shard(ahead, shard, wanted, self._manifest.layout)

    def _report(self, cause: Cause, message: str, num_samples: int = 1) -> None:
        self.faults[cause] += num_samples
        self.problems.append(message)

    def _identity(self, sample: RawSample) -> bytes:
        """Digest of the image's bytes, of the captions where there is no image."""
        captions = find_captions(self._manifest.members, self._manifest.layout.caption_field)
        shown = next((sample.members[member] for member in IMAGE_EXTENSIONS if member in sample.members), None)
        if shown is None and captions is not None:
            shown = "\n".join(captions.read(sample.members[captions.member])).encode()
        return hashlib.sha256(sample.key.encode() if shown is None else shown).digest()[:_DIGEST_BYTES]

    def _sample(self, sample: RawSample) -> _Found:
        """Decode every member.

        Raises:
            _ComplaintError: if one is missing or cannot be decoded, or the key is not new.

        """
        where = f"{sample.key} in shard {sample.shard}"
        if sample.key in self._keys:
            raise _ProblemError("duplicate_key", f"{where} occurs twice in the set")
        self._keys.add(sample.key)
        num_tokens, size, num_questions = None, None, 0
        captions = find_captions(self._manifest.members, self._manifest.layout.caption_field)
        for extension in self._manifest.members:
            if extension not in sample.members:
                raise _ProblemError("member_missing", f"{where} has no .{extension} member")
            data = sample.members[extension]
            try:
                if extension in IMAGE_EXTENSIONS:
                    size = read_image_size(data, extension)
                    decode_image(data, extension, _DECODED_SIZE)
                if captions is not None and extension == captions.member:
                    texts = captions.read(data)
                    if not texts:
                        raise _ProblemError("caption_empty", f"{where} has an empty caption")
                    num_tokens = max(len(self._tokenizer.ids(text)) for text in texts)
                if extension == "json":
                    num_questions += _num_questions(json.loads(data))
            except ValueError as error:
                cause = _choose_cause(extension, error)
                where = f"{sample.key}.{extension} in shard {sample.shard}"
                raise _ProblemError(cause, str(decode_fault(cause, where, error))) from error
        return _Found(num_tokens, size, num_questions)


def _choose_cause(extension: str, error: ValueError) -> Cause:
    if isinstance(error, ImageTooLargeError):
        return "image_too_large"
    if extension in IMAGE_EXTENSIONS:
        return "image_undecodable"
    return "text_not_utf8" if extension == CAPTION_EXTENSION else "json_malformed"


def _num_questions(annotation: object) -> int:
    questions = annotation.get("questions") if isinstance(annotation, dict) else None
    return len(questions) if isinstance(questions, list) else 0


def _share_above(limit: int, counts: list[int]) -> float:
    return sum(count > limit for count in counts) / len(counts)


def _quantiles(counts: list[int]) -> tuple[int, int, int, int]:
    """Return min, median, 95 % and max; zeros of nothing."""
    if not counts:
        return 0, 0, 0, 0
    least, median, p95, most = (int(q) for q in np.quantile(counts, QUANTILES, method="higher"))
    return least, median, p95, most
