"""Checks a set from end to end: every shard against the manifest, every sample by decoding it.

A reader stops at the first fault; a check continues and lists all of them. It also collects the set's card: counts,
sizes, lengths, and images that occur more than once.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.progress import track
from lightning_moevlm.data.format.faults import Cause, Lost, SampleFault, decode_fault
from lightning_moevlm.data.format.manifest import SPLIT, SPLITS, Manifest, Split
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard
from lightning_moevlm.data.images.decode import IMAGE_EXTENSIONS, decode_image, image_kind
from lightning_moevlm.data.images.open_image import ImageTooLargeError
from lightning_moevlm.data.inspect.thumbnails import modality_of, read_image_size
from lightning_moevlm.data.storage.next_shard import ShardPrefetcher
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.captions import CAPTION_EXTENSION, find_captions
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer

QUANTILES = (0.0, 0.5, 0.95, 1.0)
_DECODED_SIZE = 8  # pixels; small, because pixels are not used
TEXT_LENGTHS = (24, 40, 64, 128)
"""Values of `data.max_text_len`, those of the shipped configurations among them; a check counts the captions cut."""
_FRAME = 2  # [BOS] and [EOS]
_DIGEST_BYTES = 16  # of sha256, kept per image


class SplitCard(NamedTuple):
    """One row of a set's card, over samples without problems."""

    split: Split
    num_shards: int
    num_samples: int
    num_bytes: int
    modality: str  # pairs, images or texts
    caption_min: int  # tokens of a sample's longest caption, without [BOS] and [EOS]; 0 without captions
    caption_median: int
    caption_p95: int
    caption_max: int
    cut: dict[int, float]  # fraction of samples with a caption that is cut, by `data.max_text_len`
    side_min: int  # pixels of the shorter side; 0 without images
    side_median: int
    side_p95: int
    side_max: int  # pixels of the longer side
    num_questions: int
    duplicates_within: int  # samples whose image (in a set of texts: caption) occurred before in the split
    duplicates_across: int  # samples whose image occurred in an earlier split, not in this one


class CheckReport(NamedTuple):
    """The result of a check."""

    manifest: Manifest
    cards: tuple[SplitCard, ...]  # of splits with a sample without problems
    sizes: tuple[tuple[tuple[int, int], int], ...]  # ((width, height), number of images), the most frequent first
    faults: dict[Cause, int]  # lost samples
    problems: tuple[str, ...]  # one line each


class _Found(NamedTuple):
    """The content of one good sample."""

    num_tokens: int | None  # None in a set without captions
    size: tuple[int, int] | None  # width, height; None in a set without images
    num_questions: int


def check_set(storage: ShardStorage) -> CheckReport:
    """Verify shards (size, hash, count), samples (unique keys, every member decodes) and the tokenizer.

    Raises:
        UserError: if the manifest cannot be read; the report lists everything else.
    """
    manifest = storage.read_manifest()
    try:
        tokenizer = storage.read_tokenizer(manifest.tokenizer)
    except UserError as error:
        return CheckReport(manifest, (), (), {}, (str(error),))
    check = _Check(storage, manifest, tokenizer)
    if tokenizer.vocab_size != manifest.tokenizer.vocab_size:
        check.problems.append(f"the tokenizer has {tokenizer.vocab_size} ids, not {manifest.tokenizer.vocab_size}")
    wanted = [split for split in SPLITS if manifest.build.get(SPLIT, split) == split]
    empty = [split for split in wanted if not manifest.num_samples(split)]
    check.problems.extend(
        f"the {split} split of {storage} is empty; build the set again with more samples" for split in empty
    )
    cards = tuple(card for split in SPLITS if (card := check.split(split)) is not None)
    sizes = tuple(sorted(check.sizes.items(), key=lambda entry: (-entry[1], entry[0])))
    return CheckReport(manifest, cards, sizes, dict(sorted(check.faults.items())), tuple(check.problems))


class _Check:
    """Checks split after split, and collects the results."""

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
        """Check a split and return its card; None if it has no good sample."""
        shards, wanted = self._manifest.splits[split], frozenset(self._manifest.members)
        found: list[_Found] = []
        within, across = 0, 0
        for sample in self._samples(split, wanted):
            if isinstance(sample, Lost):
                self._report(sample.cause, sample.message, sample.num_samples)
                continue
            try:
                found.append(self._sample(sample))
            except SampleFault as fault:
                self._report(fault.cause, str(fault))
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
        with ShardPrefetcher(self._storage, shards) as prefetcher:
            for shard in track(shards, len(shards), f"checking {split}"):
                yield from read_shard(prefetcher, shard, wanted, self._manifest.layout)

    def _report(self, cause: Cause, message: str, num_samples: int = 1) -> None:
        self.faults[cause] += num_samples
        self.problems.append(message)

    def _identity(self, sample: RawSample) -> bytes:
        """Return the digest of the image's bytes, or of the captions in a set of texts."""
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
            raise SampleFault("duplicate_key", f"{where} occurs twice in the set")
        self._keys.add(sample.key)
        num_tokens, size, num_questions = None, None, 0
        captions = find_captions(self._manifest.members, self._manifest.layout.caption_field)
        for extension in self._manifest.members:
            if extension not in sample.members:
                raise SampleFault("member_missing", f"{where} has no .{extension} member")
            data = sample.members[extension]
            try:
                if (kind := image_kind(extension)) is not None:
                    size = read_image_size(data, kind)
                    decode_image(data, kind, _DECODED_SIZE)
                if captions is not None and extension == captions.member:
                    texts = captions.read(data)
                    if not texts:
                        raise SampleFault("caption_empty", f"{where} has an empty caption")
                    num_tokens = max(len(self._tokenizer.ids(text)) for text in texts)
                if extension == "json":
                    num_questions += _num_questions(json.loads(data))
            except ValueError as error:
                cause = _choose_cause(extension, error)
                where = f"{sample.key}.{extension} in shard {sample.shard}"
                raise decode_fault(cause, where, error) from error
        return _Found(num_tokens, size, num_questions)


def _choose_cause(extension: str, error: ValueError) -> Cause:
    if isinstance(error, ImageTooLargeError):
        return "image_too_large"
    if image_kind(extension) is not None:
        return "image_undecodable"
    return "text_not_utf8" if extension == CAPTION_EXTENSION else "json_malformed"


def _num_questions(annotation: object) -> int:
    questions = annotation.get("questions") if isinstance(annotation, dict) else None
    return len(questions) if isinstance(questions, list) else 0


def _share_above(limit: int, counts: list[int]) -> float:
    return sum(count > limit for count in counts) / len(counts)


def _quantiles(counts: list[int]) -> tuple[int, int, int, int]:
    """Return min, median, 95 % and max; zeros for an empty list."""
    if not counts:
        return 0, 0, 0, 0
    least, median, p95, most = (int(q) for q in np.quantile(counts, QUANTILES, method="higher"))
    return least, median, p95, most
