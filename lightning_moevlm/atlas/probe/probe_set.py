"""Chooses the samples on which experts are observed, and streams them.

The choice follows from the split, its number of samples and a seed. Samples are read as they are needed and forgotten,
so memory does not grow with the probe. Keys are hashed in the order of reading: two atlases with one digest have seen
the same samples.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from random import Random
from typing import Any, NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.faults import Lost, SampleFault
from lightning_moevlm.data.format.manifest import Split
from lightning_moevlm.data.format.shard_reader import RawSample
from lightning_moevlm.data.images.decode import image_kind
from lightning_moevlm.data.inspect.chosen_samples import read_chosen
from lightning_moevlm.data.inspect.thumbnails import read_image_size
from lightning_moevlm.data.read.collate import Collate, Decoded
from lightning_moevlm.data.read.join_batches import join_batches
from lightning_moevlm.data.read.open_set import OpenSet, find_annotation, find_second_image
from lightning_moevlm.data.text.annotations import ANSWERS
from lightning_moevlm.data.text.captions import ANNOTATION_EXTENSION
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer

DIGITS = 12
"""Hex digits of digests in a record."""


class ProbeBatch(NamedTuple):
    """Samples of one source, with what no batch of a training holds."""

    batch: Batch
    texts: tuple[str, ...]
    """Caption or question of each sample as it is stored; "" without one."""
    annotations: tuple[Mapping[str, Any], ...]
    """The json member of each sample; empty without one."""
    stored_sizes: tuple[tuple[int, int] | None, ...]
    """(width, height) in pixels of each stored image; None without one."""
    classes: tuple[str, ...]
    """Name of the class of each sample, where `data.annotation` names one; "" elsewhere."""

    @property
    def source(self) -> str:
        """Name of the set."""
        return self.batch.sources[0]


@dataclass(frozen=True)
class ProbeSource:
    """The part of a probe that comes from one set."""

    name: str
    manifest: str
    """Digest of the set."""
    num_samples: int
    """Chosen samples."""
    of: int
    """Samples of the split."""


@dataclass(frozen=True)
class ProbeRecord:
    """What identifies a probe."""

    split: Split
    seed: int
    sources: tuple[ProbeSource, ...]
    keys: str
    """Digest of the keys of all samples that were read, in order."""

    @property
    def name(self) -> str:
        """A short name, such as `val-512-seed0-1f3870be274f`."""
        return f"{self.split}-{sum(each.num_samples for each in self.sources)}-seed{self.seed}-{self.keys}"

    def as_json(self) -> dict[str, Any]:
        """Return it with its name, as plain values."""
        return {"name": self.name, **asdict(self)}


class ProbeSet:
    """A seeded choice of samples of a split; every iteration reads them anew, in the same order.

    Args:
        data: the data, of which a mixture gives equally many samples of each set.
        split: train, val or test.
        num_samples: of all sets together.
        seed: of the choice.

    Raises:
        UserError: fewer samples than sets, an empty split, tars without a manifest, or conversations.
    """

    def __init__(self, data: ShardDataModule, split: Split = "val", num_samples: int = 512, seed: int = 0) -> None:
        if data.plain is not None:
            raise UserError(
                "a probe names its samples, and data.urls has no list of them: make one with `moevlm data index`, and "
                "use it as data.root"
            )
        if data.chats is not None:
            raise UserError(
                "a probe labels images and texts that the data cut into tokens, and with data.chat the model's own "
                "processor does: experts of this run cannot be labelled. `moevlm audit` shows their loads by modality"
            )
        check_number("samples", num_samples, least=len(data.sets), advice=", one of each set")
        self.data, self.split, self.seed = data, split, seed
        self._numbers: dict[str, tuple[int, ...]] = {}
        for place, (name, opened) in enumerate(data.sets.items()):
            size = opened.manifest.num_samples(split)
            if not size:
                raise UserError(f"the {split} split of {name} is empty: choose another --split")
            share = num_samples // len(data.sets) + (place < num_samples % len(data.sets))
            chosen = Random(f"probe/{seed}/{name}").sample(range(size), min(share, size))
            self._numbers[name] = tuple(sorted(chosen))

    @property
    def num_samples(self) -> int:
        """Chosen samples of all sets."""
        return sum(map(len, self._numbers.values()))

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """That of the texts."""
        return self.data.tokenizer

    @cached_property
    def record(self) -> ProbeRecord:
        """What identifies the probe; reads the keys once."""
        digest = hashlib.sha256()
        for name in self.data.sets:
            opened = self.data.sets[name]
            for sample in self._read(name, opened.manifest.members[:1]):
                digest.update(f"{name}\t{sample.key}\n".encode())
        sources = tuple(
            ProbeSource(
                name,
                opened.manifest.digest[:DIGITS],
                len(self._numbers[name]),
                opened.manifest.num_samples(self.split),
            )
            for name, opened in self.data.sets.items()
        )
        return ProbeRecord(self.split, self.seed, sources, digest.hexdigest()[:DIGITS])

    def batches(self, batch_size: int = 32) -> Iterator[ProbeBatch]:
        """Yield all samples, set by set; a batch holds samples of one set."""
        for name, opened in self.data.sets.items():
            yield from self._batches(name, opened, batch_size)

    def _batches(self, name: str, opened: OpenSet, batch_size: int) -> Iterator[ProbeBatch]:
        data = self.data
        appends = data.append_answer
        collate = Collate(
            opened.members, self.tokenizer, data.image_size, data.max_text_len, data.max_pixels,
            caption_field=opened.manifest.layout.caption_field, annotation=find_annotation(opened, appends),
            second_image=find_second_image(opened),
        )  # fmt: skip
        annotated = {ANNOTATION_EXTENSION} & set(opened.manifest.members)
        place = list(data.sets).index(name)
        samples = self._read(name, (*collate.wanted, *annotated))
        while read := list(islice(samples, batch_size)):
            rows = collate.image_rows(len(read))
            kept: list[tuple[RawSample, Decoded]] = []
            for sample in read:
                try:
                    decoded = collate.decode(sample, None if rows is None else rows[len(kept)])
                except SampleFault as fault:
                    self._accept(Lost(1, fault.cause, str(fault)))
                    continue
                kept.append((sample, decoded))
            if not kept:
                continue
            batch = collate.make_batch([decoded for _, decoded in kept], None if rows is None else rows[: len(kept)])
            yield ProbeBatch(
                join_batches({place: batch}, list(data.sets)),
                tuple(decoded.caption or "" for _, decoded in kept),
                tuple(_annotation(sample) for sample, _ in kept),
                tuple(_stored_size(sample, opened.members) for sample, _ in kept),
                tuple(_class(decoded, opened) for _, decoded in kept),
            )

    def _read(self, name: str, members: Sequence[str]) -> Iterator[RawSample]:
        opened = self.data.sets[name]
        for sample in read_chosen(opened.storage, opened.manifest, self.split, self._numbers[name], members):
            if isinstance(sample, Lost):
                self._accept(sample)
            else:
                yield sample

    def _accept(self, lost: Lost) -> None:
        if not self.data.max_lost_fraction:
            raise UserError(lost.message)


def _annotation(sample: RawSample) -> Mapping[str, Any]:
    data = sample.members.get(ANNOTATION_EXTENSION)
    content = {} if data is None else json.loads(data.decode("utf-8-sig"))
    return content if isinstance(content, dict) else {}


def _class(decoded: Decoded, opened: OpenSet) -> str:
    names_class = opened.annotation is not None and opened.annotation != ANSWERS
    return decoded.answers[0] if names_class and decoded.answers else ""


def _stored_size(sample: RawSample, members: Sequence[str]) -> tuple[int, int] | None:
    name = next((member for member in members if image_kind(member) is not None), None)
    kind = None if name is None else image_kind(name)
    return None if name is None or kind is None else read_image_size(sample.members[name], kind)
