"""Opens tars without a manifest: looks into the first ones once, for a tokenizer and for what an epoch is.

What was found is kept in the cache folder, so that later runs, other ranks and evaluation have the same tokenizer.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import msgspec

from lightning_moevlm.common.atomic_files import explain_write_errors, write_atomically
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.faults import Lost, lost_sample_error
from lightning_moevlm.data.format.layout import Layout
from lightning_moevlm.data.format.manifest import Manifest, ShardEntry, Split, TokenizerEntry
from lightning_moevlm.data.plain.options import WebDatasetOptions
from lightning_moevlm.data.plain.pipeline import read_tars
from lightning_moevlm.data.plain.source import PlainSource
from lightning_moevlm.data.read.collate import Collate
from lightning_moevlm.data.read.open_set import OpenSet
from lightning_moevlm.data.storage.find_tars import FoundTar, find_tars
from lightning_moevlm.data.storage.shard_cache import default_cache_dir
from lightning_moevlm.data.text.captions import find_captions
from lightning_moevlm.data.text.tokenizer import TOKENIZER_FILE, train_tokenizer

_ENOUGH_CAPTIONS = 10_000
_MOST_TARS = 3  # looked into for captions


class FirstLook(msgspec.Struct, frozen=True):
    """What the first look has found."""

    per_tar: int  # samples of the first training tar; 0 if it was not read
    held_out: tuple[int, ...]  # samples of each held-out tar


@dataclass(frozen=True)
class PlainTars:
    """The tars of `data.urls`.

    Args:
        urls: names of the tars.
        options: of their reading.
        allowed_protocols: of their addresses.
        cache_dir: folder of the cache; None is the user's.
        vocab_size: of a tokenizer that is fitted.
        fits: whether a tokenizer is fitted; otherwise the user has one.
        tolerant: whether samples may be lost.
    """

    urls: list[str] | str
    options: WebDatasetOptions
    allowed_protocols: tuple[str, ...]
    cache_dir: str | None
    vocab_size: int
    fits: bool
    tolerant: bool

    @cached_property
    def tars(self) -> dict[str, tuple[FoundTar, ...]]:
        """Tars of training (`train`) and those held out (`val`).

        Raises:
            UserError: no tar is found, or too few are.
        """
        found = find_tars(self.urls, self.allowed_protocols)
        if self.options.held_out is not None:
            held_out = find_tars(self.options.held_out, self.allowed_protocols, "data.webdataset.held_out")
            places = {tar.place for tar in held_out}
            found = tuple(tar for tar in found if tar.place not in places)
        else:
            found, held_out = found[:-1], found[-1:]
        if not found:
            raise UserError(
                "data.urls names one tar, which cannot serve training and validation both: name more tars, or others "
                "in data.webdataset.held_out"
            )
        return {"train": found, "val": held_out}

    @property
    def promise(self) -> str:
        """What cannot be promised of them, as a line."""
        tars, opened = self.tars, self.open_set(None, None)
        num_tars = f"{len(tars['train'])} tar{'' if len(tars['train']) == 1 else 's'}"
        held_out = ", ".join(Path(tar.file).name for tar in tars["val"][:3]) + (", ..." if len(tars["val"]) > 3 else "")
        return (
            f"data.urls: {num_tars} without a manifest, {held_out} held out. An epoch is "
            f"{opened.manifest.num_samples('train'):,} samples from tars that are drawn, not each sample once; a "
            "resumed run draws other samples than an uninterrupted one; the order changes with the number of ranks. "
            "`moevlm data index` makes a set that promises all three"
        )

    @property
    def tokenizer_file(self) -> str:
        """The file of the fitted tokenizer."""
        _ = self.look
        return str(self._folder / TOKENIZER_FILE)

    @cached_property
    def look(self) -> FirstLook:
        """Look into the first tars and the held-out ones, unless it was done before.

        Raises:
            UserError: a sample is lost without tolerance, or there is none with a caption.
        """
        kept = self._folder / "look.json"
        try:
            return msgspec.json.decode(kept.read_bytes(), type=FirstLook)
        except (OSError, msgspec.MsgspecError):
            pass
        captions: list[str] = []
        per_tar = 0
        if self.fits or self.options.epoch_samples is None:
            for number, tar in enumerate(self.tars["train"][:_MOST_TARS]):
                found = list(self._captions(tar))
                per_tar = len(found) if number == 0 else per_tar
                captions += [caption for each in found for caption in each]
                if not self.fits or len(captions) >= _ENOUGH_CAPTIONS:
                    break
        held_out = tuple(sum(1 for _ in self._captions(tar)) for tar in self.tars["val"])
        with explain_write_errors(self._folder, "free disk space, or name another folder in data.cache_dir"):
            self._folder.mkdir(parents=True, exist_ok=True)
            if self.fits:
                train_tokenizer(islice(captions, _ENOUGH_CAPTIONS), self.vocab_size, self._folder)
            look = FirstLook(per_tar, held_out)
            write_atomically(kept, msgspec.json.encode(look).decode())
        return look

    def open_set(self, annotation: str | None, second_image: str | None) -> OpenSet:
        """Return the tars as a set whose manifest holds what is known of them.

        Raises:
            UserError: as `look` and `tars`.
        """
        if second_image is not None:
            raise UserError("data.second_image is not read from data.urls: index the tars, or set it to null")
        train, held_out = self.tars["train"], self.tars["val"]
        num_samples = self.options.epoch_samples or self.look.per_tar * len(train)
        counted = tuple(
            ShardEntry(tar.file, number, 0, "") for tar, number in zip(held_out, self.look.held_out, strict=True)
        )
        known = [tar.place for tar in (*train, *held_out)]
        members = (*(("image",) if self.options.images else ()), *self._texts, "json")
        manifest = Manifest(
            name="urls", version=1, licence="not stated", licence_url="", attribution="", image_size=0, members=members,
            build={"tars": hashlib.sha256(json.dumps(known).encode()).hexdigest(), "options": self.options.describe()},
            sources={}, tokenizer=TokenizerEntry(TOKENIZER_FILE, "", 0),
            splits={"train": (ShardEntry("urls", num_samples, 0, ""),), "val": counted, "test": counted},
            layout=Layout({}, self.options.caption_field or "", keys_repeat=False),
        )  # fmt: skip
        wanted = tuple(member for member in members if member != "json" or self.options.caption_field is not None)
        return OpenSet(train[0].storage, manifest, wanted, annotation, None)

    def source(self, name: str, opened: OpenSet, split: Split, collate: Collate) -> PlainSource:
        """Return the tars of a split, with the decoder of its samples."""
        tars = self.tars["train" if split == "train" else "val"]
        shards = opened.manifest.splits[split]
        return PlainSource(name, tars, shards, collate, self.options, split != "train", self.tolerant)

    @property
    def _texts(self) -> tuple[str, ...]:
        return ("txt",) if self.options.text is not None and self.options.caption_field is None else ()

    def _captions(self, tar: FoundTar) -> Iterator[tuple[str, ...]]:
        """Yield the captions of each sample of a tar; a lost one has none.

        Raises:
            UserError: at the first loss without tolerance.
        """
        captions = (
            find_captions(self._texts or ("json",), self.options.caption_field or "") if self.options.text else None
        )
        wanted = frozenset(({"image"} if self.options.images else set()) | ({captions.member} if captions else set()))
        for sample in read_tars([tar], self.options, wanted, self.tolerant):
            if isinstance(sample, Lost):
                if not self.tolerant:
                    raise lost_sample_error(sample)
                yield ()
                continue
            try:
                yield captions.read(sample.members[captions.member]) if captions else ()
            except ValueError:
                yield ()  # told when it is read for training

    @cached_property
    def _folder(self) -> Path:
        above = default_cache_dir().parent if self.cache_dir is None else Path(self.cache_dir).expanduser()
        known = [_identity(tar) for split in self.tars.values() for tar in split]
        text = json.dumps([known, self.options.describe(), self.vocab_size, self.fits])
        return above / "plain" / hashlib.sha256(text.encode()).hexdigest()[:16]


def _identity(tar: FoundTar) -> Sequence[object]:
    """Return what tells a tar from another; a local one that has changed is another."""
    if tar.storage.folder is None:
        return [tar.place]
    try:
        stat = (tar.storage.folder / tar.file).stat()
    except OSError:
        return [tar.place]
    return [tar.place, stat.st_size, stat.st_mtime_ns]
