"""Loads sets of shards: a LightningDataModule over one set (`data.root`) or a mixture of several (`data.sources`).

Training reads in a new order every epoch and resumes to the batch. Validation, testing and prediction (on the test
split) read every sample once, in fixed order. If `trainer.accumulate_grad_batches` does not divide the batches of an
epoch, an epoch of the trainer has as many batches as make whole optimiser steps, and the rest comes in the next.
`num_workers` 0 is the fastest on two cores for small models, because workers take a core from the arithmetic.

In a mixture, the tokenizer of the first source with texts encodes all texts (byte-level BPE can spell any), unless
`data.tokenizer` names another. Validation does not depend on weights, so that mixtures can be compared. It reads the
sources that are used as pairs, one after the other, or all sources if there are none.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.data.format.faults import MAX_PIXELS
from lightning_moevlm.data.format.manifest import Manifest, MixedManifest, Split
from lightning_moevlm.data.images.augment import Augment
from lightning_moevlm.data.inspect.cut_texts import describe_cut_texts
from lightning_moevlm.data.load.device_stage import DeviceStage, warn_without_gpu
from lightning_moevlm.data.load.shard_loader import LoaderState, ShardLoader, refuse_uneven_workers
from lightning_moevlm.data.plain.draw_reader import DrawReader
from lightning_moevlm.data.plain.options import WebDatasetOptions
from lightning_moevlm.data.plain.plain_tars import PlainTars
from lightning_moevlm.data.read.bad_batches import BadBatches
from lightning_moevlm.data.read.collate import Collate
from lightning_moevlm.data.read.evaluation_reader import FixedReader
from lightning_moevlm.data.read.mixture import Mixture, Source, StepClock, name_sources
from lightning_moevlm.data.read.open_set import (
    OpenSet,
    check_local_shards,
    choose_tokenizer,
    digest_sets,
    find_annotation,
    find_second_image,
    open_set,
    refuse_other_than_jpegs,
)
from lightning_moevlm.data.read.reader import Reader
from lightning_moevlm.data.read.sample_order import Rank, train_batches
from lightning_moevlm.data.read.source_stream import OpenSource, ReadSource
from lightning_moevlm.data.read.train_reader import TrainReader
from lightning_moevlm.data.read.whole_steps import refuse_smaller_step, whole_steps
from lightning_moevlm.data.storage.shard_storage import CACHE_GIB, PROTOCOLS, ShardStorage
from lightning_moevlm.data.text.chat import ChatMaker, ChatOptions
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer


class ShardDataModule(LightningDataModule):
    """Loaders over one set of shards, or a mixture of several.

    Args:
        root: Folder of the set, as made by `moevlm data build`, or its address: http, https, s3, gs. Credentials and
            endpoints of object stores come from the environment. Null with `sources`.
        batch_size: Samples per rank and step.
        image_size: Pixels per side that the model sees; other sizes are scaled.
        max_text_len: Token ids per text, [BOS] and [EOS] included; longer captions are cut, and a run prints the share.
        vocab_size: Number of token ids that the model embeds; at least that of the set's tokenizer.
        num_workers: Processes that read and decode; 0 reads in the training process. The order of samples is the same
            for any number.
        shuffle_buffer: Samples per stream (and source) from which the next training sample is chosen.
        seed: Seed of the order of training samples.
        cache_dir: Folder for shards of a remote set; null is `~/.cache/lightning-moevlm/shards`.
        cache_gib: Size limit of that folder in GiB; the least recently used shards go first. null: no limit.
        allowed_protocols: Protocols allowed in `root`; others that fsspec supports can be added.
        num_streams: Logical streams per rank, a multiple of `num_workers`; batches come from them in turn.
        max_lost_fraction: Fraction of unreadable samples that is tolerated. With 0, the first one stops the run.
        sources: Sets to mix, by name, in place of `root`; a source that is null is left out.
        decode: Place of image decoding: `cpu`, in the reading processes, or `device`, JPEGs only, on the GPU of the
            rank (extra `gpu-decode`).
        max_pixels: Largest image accepted, in pixels (width x height). Larger ones count as lost and are never decoded.
        augment: Crops and flips of training images, on the device; null turns them off. Evaluation has none.
        annotation: Read beside images and texts: `answers` where texts are questions, `cls` for the class member of
            CLIP_benchmark's sets, or a field of the json member that names the class; null for nothing. Sources may
            name their own, as with second_image.
        append_answer: Whether an answer follows the question in its text, after [EOS]: one of those given, drawn anew
            in every epoch, and in evaluation the most frequent. Needs the annotation answers; null appends none.
        second_image: Read beside the image of each sample: `right`, the other image of statements about two; null for
            none.
        tokenizer: A tokenizer.json of the tokenizers library in place of the set's; null uses the set's.
        urls: Tars without a manifest in place of `root`: `s3://bucket/name-{0000..0331}.tar`, a folder, or a list.
        webdataset: Reading of `urls`: members, decoding, a function for samples, tars held out.
        skip: Keys of training samples that are left out; a later sample of the stream stands in for each, and other
            batches stay as they are. Null skips none.
        prefetch: Batches copied to the GPU, decoded and augmented there ahead of the model; null turns this off.
        bad_batches: Training batches to spoil on purpose, for studies of faults; null spoils none.
        chat: Conversations, made by the processor of the model that `model.backbone.path` names; null makes none.
    """

    def __init__(
        self,
        root: str | None,
        batch_size: int,
        image_size: int,
        max_text_len: int,
        vocab_size: int,
        num_workers: int = 0,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        cache_dir: str | None = None,
        cache_gib: float | None = CACHE_GIB,
        allowed_protocols: tuple[str, ...] = PROTOCOLS,
        num_streams: int = 4,
        max_lost_fraction: float = 0.0,
        sources: dict[str, Source | None] | None = None,
        decode: Literal["cpu", "device"] = "cpu",
        max_pixels: int = MAX_PIXELS,
        augment: Augment | None = None,
        prefetch: int | None = None,
        annotation: str | None = None,
        append_answer: bool | None = None,
        second_image: Literal["right"] | None = None,
        tokenizer: str | None = None,
        urls: list[str] | str | None = None,
        webdataset: WebDatasetOptions | None = None,
        skip: list[str] | None = None,
        bad_batches: BadBatches | None = None,
        chat: ChatOptions | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("image_size", image_size, 8),
            ("max_text_len", max_text_len, 3),
            ("num_workers", num_workers, 0),
            ("shuffle_buffer", shuffle_buffer, 1),
            ("num_streams", num_streams, 1),
            ("max_pixels", max_pixels, 1),
            ("prefetch", prefetch, 1),
        ):
            if value is not None:
                check_number(f"data.{name}", value, least=least)
        refuse_uneven_workers(num_workers, num_streams)
        check_number("data.max_lost_fraction", max_lost_fraction, least=0, below=1)
        self.sources = name_sources(root, sources or {}, urls is not None)
        if bad_batches is not None:
            bad_batches.check(decode == "device", urls is not None)
        protocols, tolerant = tuple(allowed_protocols), max_lost_fraction > 0
        self.plain, self.skip = None, frozenset(skip or ())
        if urls is not None:
            if skip:
                raise UserError("data.skip needs a set with a manifest: index data.urls by `moevlm data index`")
            reading = webdataset or WebDatasetOptions()
            self.plain = PlainTars(urls, reading, protocols, cache_dir, vocab_size, tokenizer is None, tolerant)
        self.storages = {
            name: ShardStorage(source.root, cache_dir, cache_gib, protocols) for name, source in self.sources.items()
        }
        self.mixture = Mixture(tuple(self.sources.values()))
        self.batch_size, self.num_workers = batch_size, num_workers
        self.image_size, self.max_text_len, self.vocab_size = image_size, max_text_len, vocab_size
        self.shuffle_buffer, self.seed, self.num_streams = shuffle_buffer, seed, num_streams
        self.max_lost_fraction, self.max_pixels, self.decode = max_lost_fraction, max_pixels, decode
        self.augment, self.prefetch = augment, prefetch
        self.annotation, self.append_answer = annotation, bool(append_answer)
        self.tokenizer_file, self.second_image, self.bad_batches = tokenizer, second_image, bad_batches
        unread = {"augment": augment, "bad_batches": bad_batches}
        self.chats = None if chat is None else ChatMaker(chat, unread)
        if append_answer and not any((each.annotation or annotation) == "answers" for each in self.sources.values()):
            raise UserError("data.append_answer is true, and no answers are read: set data.annotation to answers")
        second = next((each.second_image for each in self.sources.values() if each.second_image), second_image)
        if second is not None and decode == "device":
            raise UserError(
                f"data.decode is device and second_image is {second}: the device decodes one image of each "
                "sample; set data.decode cpu"
            )
        self.train_loader: ShardLoader | None = None
        self._resume_from: LoaderState | None = None

    @cached_property
    def sets(self) -> dict[str, OpenSet]:
        """The sets by name of their source; the set of `root` has its own name.

        Raises:
            UserError: if there is no set (with the command that builds one), its manifest is broken, or it lacks the
                modality of the source.
        """
        if self.plain is not None:
            return {"urls": self.plain.open_set(self.annotation, self.second_image)}
        opened = [
            open_set(source, self.storages[name], self.annotation, self.second_image)
            for name, source in self.sources.items()
        ]
        return {name or found.metric_name: found for name, found in zip(self.sources, opened, strict=True)}

    @property
    def manifest(self) -> Manifest | MixedManifest:
        """The manifest of the set; of a mixture, its name."""
        found = [opened.manifest for opened in self.sets.values()]
        return found[0] if self._is_alone else MixedManifest("+".join(manifest.name for manifest in found))

    @property
    def manifest_digest(self) -> str:
        """Hash of the exact data, and of a tokenizer or processor that is not theirs."""
        is_foreign = self.tokenizer_file is not None or self.plain is not None
        return digest_sets(self.sets, self.tokenizer if is_foreign else None, self.chats)

    @cached_property
    def tokenizer(self) -> CaptionTokenizer:
        """The tokenizer of the option, else of the set; of a mixture, of the first source with texts.

        Raises:
            UserError: if it is missing, altered, or has more ids than the model.
        """
        fitted = None if self.plain is None or self.tokenizer_file is not None else self.plain.tokenizer_file
        return choose_tokenizer(list(self.sets.values()), self.tokenizer_file or fitted, self.vocab_size)

    def prepare_data(self) -> None:
        """Check manifests, tokenizer and shards, before anything is written; tell if training texts are cut.

        The shards of a small set are hashed. Those of a large set have their size checked, and are hashed when a
        process first opens them. Those of a remote set are downloaded and verified when they are opened. If losses are
        tolerated, the reader checks shards.
        """
        _ = self.tokenizer  # the property raises what is wrong with it
        if self.tokenizer_file is not None:
            rank_zero_info(f"data.tokenizer {self.tokenizer_file}: {self.tokenizer.control.describe()}")
        if self.plain is not None:
            rank_zero_info(self.plain.promise)
            return
        for opened in self.sets.values():
            if self.decode == "device":
                refuse_other_than_jpegs(opened)
            if self.max_lost_fraction == 0:
                check_local_shards(opened)
        if self.chats is not None:
            _ = self.chats.processor  # likewise
        elif self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            for line in describe_cut_texts(self.sets, self.tokenizer, self.max_text_len, self.append_answer):
                rank_zero_info(line)

    def setup(self, stage: str) -> None:
        """Refuse a limit on batches that would make an epoch's last optimiser step smaller than the others.

        Report if epochs of the trainer differ from those of the data.
        """
        trainer: Any = self.trainer
        if stage != "fit" or trainer is None or trainer.overfit_batches > 0 or trainer.fast_dev_run:
            return
        limit = self._train_limit(self._whole_steps)
        option = f"trainer.limit_train_batches {trainer.limit_train_batches}"
        refuse_smaller_step(limit or 0, self._batches_per_step, option)
        if self._whole_steps != self._batches_per_pass > 0:
            rank_zero_info(
                f"{self._batches_per_pass} batches do not make whole steps of {self._batches_per_step}: an epoch of "
                f"the trainer has {self._whole_steps} batches, and the rest comes in the next one"
            )

    def train_dataloader(self) -> ShardLoader:
        """Return whole batches in a new order every epoch; in fixed order under `overfit_batches`."""
        trainer = self.trainer
        opened = self._open("train", self.sets)
        if trainer is not None and trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            if self.skip:
                raise UserError("data.skip replaces samples of shuffled batches: set trainer.overfit_batches to 0")
            loader = self._fixed(opened)
        else:
            rank = self._rank
            per_step, whole = self._batches_per_step, self._whole_steps
            limit = self._train_limit(whole)
            clock = StepClock(limit or whole, per_step)
            tolerant = self.max_lost_fraction > 0
            reader: Reader
            if self.plain is not None:
                (source,) = opened
                reader = DrawReader(
                    source, self.batch_size, rank, self.num_streams, tolerant, self.shuffle_buffer, self.seed, whole
                )
            else:
                reader = TrainReader(
                    opened, self.mixture, self.batch_size, rank, self.shuffle_buffer, self.seed, self.num_streams,
                    clock, tolerant, self.skip, self.bad_batches,
                )  # fmt: skip
            stage = self._stage(self.augment, fills=True)
            loader = ShardLoader(
                reader, self.num_workers, self.manifest_digest, limit, self.max_lost_fraction, stage, per_step
            )
        if self._resume_from is not None:
            loader.load_state_dict(self._resume_from)
            self._resume_from = None
        self.train_loader = loader
        return loader

    def ordered_train_dataloader(self) -> ShardLoader:
        """Return every training sample once, in fixed order, for tasks that fit something to them."""
        return self._fixed(self._open("train", self._evaluated))

    def val_dataloader(self) -> ShardLoader:
        """Return every validation sample once, in fixed order."""
        return self._fixed(self._open("val", self._evaluated))

    def test_dataloader(self) -> ShardLoader:
        """Return every test sample once, in fixed order."""
        return self._fixed(self._open("test", self._evaluated))

    def predict_dataloader(self) -> ShardLoader:
        """Every test sample once, in fixed order."""
        return self.test_dataloader()

    def state_dict(self) -> LoaderState | dict[str, Any]:  # type: ignore[override]
        """Return the place in the training data; Lightning saves it in every checkpoint.

        Lightning saves the loader's own state too, but restores it only from checkpoints within an epoch. After one at
        the end of an epoch, the data would begin anew.
        """
        return {} if self.train_loader is None else self.train_loader.state_dict()

    def load_state_dict(self, state_dict: LoaderState) -> None:  # type: ignore[override]
        """Keep the place for the training loader."""
        self._resume_from = state_dict or None

    @property
    def _is_alone(self) -> bool:
        return len(self.sources) == 1

    @property
    def _rank(self) -> Rank:
        return Rank(0, 1) if self.trainer is None else Rank(self.trainer.global_rank, self.trainer.world_size)

    @property
    def _evaluated(self) -> dict[str, OpenSet]:
        return {name: opened for name, opened in self.sets.items() if opened.gives_pairs} or self.sets

    def _open(self, split: Split, sets: Mapping[str, OpenSet]) -> tuple[Any, ...]:
        """Return the split of each set: `OpenSource`, or `PlainSource` of tars without a manifest."""
        if self.plain is not None:
            (opened,) = sets.values()
            return (self.plain.source("urls", opened, split, self._collate(opened)),)
        return tuple(
            OpenSource(
                name, opened.storage, opened.manifest.splits[split], self._collate(opened), opened.manifest.layout
            )
            for name, opened in sets.items()
        )

    def _collate(self, opened: OpenSet) -> Collate:
        keeps_jpegs = self.decode == "device"
        if keeps_jpegs:
            refuse_other_than_jpegs(opened)
        return Collate(
            opened.members, self.tokenizer, self.image_size, self.max_text_len, self.max_pixels, keeps_jpegs,
            opened.manifest.layout.caption_field, find_annotation(opened, self.append_answer),
            find_second_image(opened), self.chats,
        )  # fmt: skip

    def _stage(self, augment: Augment | None, fills: bool) -> DeviceStage | None:
        """Return the stage that prepares batches in this process; None if all of its options are off."""
        if self.decode == "cpu" and augment is None and self.prefetch is None:
            return None
        return DeviceStage(
            self._device, self.image_size, self.max_pixels, augment, self.seed, self._rank.index, self.prefetch or 0,
            tolerant=self.max_lost_fraction > 0, fills=fills,
        )  # fmt: skip

    @cached_property
    def _device(self) -> torch.device:
        """The model's device. Warns once if options need a GPU and there is none."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if self._rank.index == 0:
            warn_without_gpu(device, self.decode, self.prefetch)
        return device

    def _fixed(self, opened: tuple[ReadSource, ...]) -> ShardLoader:
        reader = FixedReader(opened, self.batch_size, self._rank, self.num_streams, self.max_lost_fraction > 0)
        stage = self._stage(augment=None, fills=False)
        return ShardLoader(reader, self.num_workers, self.manifest_digest, None, self.max_lost_fraction, stage)

    @property
    def _batches_per_step(self) -> int:
        """Batches per optimiser step; also in a fast_dev_run, which is the beginning of the real run."""
        return 1 if self.trainer is None else self.trainer.accumulate_grad_batches

    @property
    def _whole_steps(self) -> int:
        """Training batches per epoch of the trainer."""
        return whole_steps(self._batches_per_pass, self._batches_per_step)

    @property
    def _batches_per_pass(self) -> int:
        """Training batches in one pass through the data."""
        num_samples = sum(shard.num_samples for one in self.sets.values() for shard in one.manifest.splits["train"])
        return train_batches(num_samples, self.batch_size, self._rank.world_size)

    def _train_limit(self, num_batches: int) -> int | None:
        """Return the end of an epoch by the trainer's limit_train_batches (a count or a fraction)."""
        if self.trainer is None:
            return None
        limit = self.trainer.limit_train_batches
        return min(num_batches, limit if isinstance(limit, int) else int(num_batches * limit))
