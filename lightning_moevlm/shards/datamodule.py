"""A set of shards as a LightningDataModule: `data.root` names the set, everything else how it is read.

Training reads in a new order every epoch and resumes to the batch; validation, testing and prediction (on
the test split) read every sample once, in fixed order. `num_workers` 0 is the fastest on two cores for
small models: workers take a core from the arithmetic.
"""

from functools import cached_property

from lightning.pytorch import LightningDataModule

from lightning_moevlm.errors import UserError
from lightning_moevlm.shards.collate import Collate
from lightning_moevlm.shards.loader import LoaderState, ShardLoader
from lightning_moevlm.shards.manifest import (
    MANIFEST_FILE,
    Manifest,
    Split,
    check_shard_size,
)
from lightning_moevlm.shards.reader import Rank, ShardReader
from lightning_moevlm.shards.storage import CACHE_GIB, PROTOCOLS, ShardStorage
from lightning_moevlm.shards.tokenizer import CaptionTokenizer

_HASHED_BEFOREHAND_BYTES = 256 * 2**20


class ShardDataModule(LightningDataModule):
    """Loaders over one set of shards.

    Args:
        root: Folder of the set, as made by `moevlm data build`, or its address: http, https, s3, gs. Credentials and
            endpoints of object stores come from the environment.
        batch_size: Samples per rank and step.
        image_size: Pixels per side that the model sees; other sizes are scaled.
        max_text_len: Token ids per text, [BOS] and [EOS] included; longer captions are cut.
        vocab_size: Ids that the model can embed; the set's tokenizer must not have more.
        num_workers: Processes that read and decode; 0 reads in the training process.
        shuffle_buffer: Samples per worker from which the next training sample is chosen.
        seed: Of the order of training samples.
        cache_dir: Where shards of a remote set are kept; null is `~/.cache/lightning-moevlm/shards`.
        cache_gib: GiB to keep there, the least recently used shards go first; null is not bounded.
        allowed_protocols: Protocols that `root` may have; another one that fsspec knows can be named here.

    """

    def __init__(
        self,
        root: str,
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
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("image_size", image_size, 8),
            ("max_text_len", max_text_len, 3),
            ("num_workers", num_workers, 0),
            ("shuffle_buffer", shuffle_buffer, 1),
        ):
            if value < least:
                raise UserError(f"data.{name} is {value}, but must be at least {least}")
        self.storage = ShardStorage(root, cache_dir, cache_gib, tuple(allowed_protocols))
        self.batch_size = batch_size
        self.image_size = image_size
        self.max_text_len = max_text_len
        self.vocab_size = vocab_size
        self.num_workers = num_workers
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self._train_loader: ShardLoader | None = None
        self._resume_from: LoaderState | None = None

    @cached_property
    def manifest(self) -> Manifest:
        """What the set holds.

        Raises:
            UserError: if there is no set, with the command that builds one; or if its manifest is broken.

        """
        folder = self.storage.folder
        if folder is not None and not (folder / MANIFEST_FILE).is_file():
            recipe = "openmoji" if "openmoji" in folder.name else "scenes"
            raise UserError(
                f"there is no set of shards in {folder}; build one with `moevlm data build {recipe} --out {folder}`"
            )
        return self.storage.manifest()

    @property
    def manifest_digest(self) -> str:
        """The hash that names the exact data."""
        return self.manifest.digest

    @cached_property
    def tokenizer(self) -> CaptionTokenizer:
        """The set's tokenizer.

        Raises:
            UserError: if it is missing, altered, or has more ids than the model.

        """
        entry = self.manifest.tokenizer
        if entry.vocab_size > self.vocab_size:
            raise UserError(
                f"the tokenizer of {self.storage} has {entry.vocab_size} ids, "
                f"data.vocab_size is {self.vocab_size}; "
                f"raise it to {entry.vocab_size} or more, or build the set with a smaller --vocab_size"
            )
        return self.storage.tokenizer(entry)

    def prepare_data(self) -> None:
        """Fail before anything is written if the set is not in order: manifest, tokenizer, every shard.

        Shards are hashed here when the whole set is small; those of a large set have their size checked here and are
        hashed whenever one is opened. Those of a remote set are downloaded, and verified, when they are opened.
        """
        assert self.tokenizer.vocab_size <= self.vocab_size  # the property refuses, with the remedy
        shards = [shard for split in self.manifest.splits.values() for shard in split]
        if self.storage.folder is None:
            return
        small = sum(shard.num_bytes for shard in shards) <= _HASHED_BEFOREHAND_BYTES
        for shard in shards:
            if small:
                self.storage.local_path(shard)
            else:
                check_shard_size(self.storage.folder, shard)

    def train_dataloader(self) -> ShardLoader:
        """Whole batches in a new order every epoch; in fixed order while overfitting a few batches."""
        trainer = self.trainer
        overfitting = trainer is not None and trainer.overfit_batches > 0  # type: ignore[attr-defined]
        reader = self._reader("train", 0 if overfitting else self.shuffle_buffer)
        loader = ShardLoader(reader, self.num_workers, self._train_limit(reader.num_batches))
        if self._resume_from is not None:
            loader.load_state_dict(self._resume_from)
            self._resume_from = None
        self._train_loader = loader
        return loader

    def val_dataloader(self) -> ShardLoader:
        """Every validation sample once, in fixed order; the last batch may be short."""
        return ShardLoader(self._reader("val", 0), self.num_workers)

    def test_dataloader(self) -> ShardLoader:
        """Every test sample once, in fixed order; the last batch may be short."""
        return ShardLoader(self._reader("test", 0), self.num_workers)

    def predict_dataloader(self) -> ShardLoader:
        """Every test sample once, in fixed order; the last batch may be short."""
        return self.test_dataloader()

    def state_dict(self) -> LoaderState:
        """Return the place in the training data; Lightning puts it into every checkpoint.

        Lightning saves the loader's own state as well, but restores it only from checkpoints inside an epoch:
        from one at the end of an epoch, the data would begin anew.
        """
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: LoaderState) -> None:
        """Remember the place; it is taken when the training loader is made."""
        self._resume_from = state_dict

    def _reader(self, split: Split, shuffle_buffer: int) -> ShardReader:
        collate = Collate(self.manifest.members, self.tokenizer, self.image_size, self.max_text_len)
        rank = Rank(0, 1)
        if self.trainer is not None:
            rank = Rank(self.trainer.global_rank, self.trainer.world_size)
        return ShardReader(
            self.storage, self.manifest, split, collate, self.batch_size, rank, shuffle_buffer, self.seed
        )

    def _train_limit(self, num_batches: int) -> int | None:
        """Where the trainer's limit_train_batches (a count or a share) ends an epoch."""
        if self.trainer is None:
            return None
        limit = self.trainer.limit_train_batches
        return limit if isinstance(limit, int) else int(num_batches * limit)
