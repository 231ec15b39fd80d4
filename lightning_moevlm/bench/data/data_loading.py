"""`moevlm bench data`: rates of reading, parsing, decoding and the whole loader, beside a ceiling and a peer.

Ceiling: decoding alone, from JPEG bytes in memory to images of the model's size, in as many processes as the loader
uses. Reading, hashing, parsing, shuffling, tokenising and the transport between processes reduce the loader's rate.
Rates are of the steady state, from the first batch of an epoch to its last, without the start of workers. Work in this
process alone (stages, 0 workers) is timed by its CPU time, which other processes do not change; workers by the wall
clock.

Fed: a consumer computes for a fixed time on each batch. The figure is its rate with the loader over its rate on one
fixed batch, so that it shows the cores that workers take from the training.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import simplejpeg
import torch

from lightning_moevlm.bench.candidates import Candidate
from lightning_moevlm.bench.data.plain_webdataset import plain_batches
from lightning_moevlm.bench.timing import Seconds, interleave, ratio
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.layout import PLAIN_LAYOUT
from lightning_moevlm.data.format.manifest import Manifest, file_sha256, read_manifest
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard, require_all
from lightning_moevlm.data.images.decode import decode_image, fit, image_rows, jpeg_scaling
from lightning_moevlm.data.read.collate import Collate
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.texts import decode_text
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer, load_tokenizer
from lightning_moevlm.data.write.demo.scenes import build_scenes

SIZES = (64, 224)
WORKERS = (0, 1, 2)
BATCH_SIZE = 64
CONSUMER_SECONDS = 0.1  # per batch of 64: the pace of a small model on a CPU
STORED_SIZE = 256
_NUM_SCENES = 1700  # 1360 of them for training
_MAX_TEXT_LEN = 48
_SHUFFLE_BUFFER = 16  # small, so that filling and draining it does not affect the rates
_NUM_STAGED = 512
_NUM_BATCHES, _NUM_CONSUMED = 20, 10  # timed, at most
_ANY_VOCABULARY = 2**31

READ, PARSE, TOKENISE = "read and hash", "read, hash and parse", "tokenise"
DECODE, RESIZE, COLLATE = "decode without resizing", "resize", "decode, tokenise and collate"
CEILING, LOADER, PLAIN, FED, FIXED = "decode only", "loader", "webdataset + Pillow", "fed", "fixed batch"


class DataSet(NamedTuple):
    """The set to read, and some of its training samples in memory."""

    root: Path
    manifest: Manifest
    tokenizer: CaptionTokenizer
    samples: Sequence[RawSample]

    @property
    def shards(self) -> list[Path]:
        """The training shards."""
        return [self.root / shard.file for shard in self.manifest.splits["train"]]


class DataTimes(NamedTuple):
    """Seconds per sample by name, one per round, rounds in the same order for all."""

    seconds: Seconds

    def rate(self, name: str) -> float:
        """Samples per second, the median over rounds."""
        return 1 / statistics.median(self.seconds[name])

    def share(self, name: str, of: str) -> float:
        """Rate of `name` over that of `of`: the larger of two estimates, as in `timing`."""
        return 1 / ratio(self.seconds, name, of).fairest

    def records(self) -> list[dict[str, object]]:
        """Return one record per name, as `--json` writes them."""
        return [
            {
                "bench": "data",
                "impl": name,
                "samples_per_s": round(self.rate(name), 1),
                "share_of_ceiling": self._of_ceiling(name),
                "rounds": len(times),
            }
            for name, times in self.seconds.items()
        ]

    def _of_ceiling(self, name: str) -> float | None:
        what, _, where = name.partition(", ")
        return round(self.share(name, f"{CEILING}, {where}"), 3) if what in (LOADER, PLAIN) else None


def name_timed(what: str, size: int, workers: int | None = None) -> str:
    """Name a measurement at an image size, with a number of workers."""
    return f"{what}, {size} px" + ("" if workers is None else f", {workers} workers")


def build_set(root: Path) -> None:
    """Build the set to measure: scenes from the installed art, JPEG, quality 90."""
    build_scenes(root, _NUM_SCENES, STORED_SIZE, "jpg", 64, seed=0, samples_per_shard=340, vocab_size=640, force=False)


def open_set(root: Path) -> DataSet:
    """Open a set of JPEGs with captions.

    Raises:
        UserError: the set is missing, has no JPEGs or captions, or too few samples or shards.
    """
    manifest = read_manifest(root)
    if not {"jpg", "txt"} <= set(manifest.members) or manifest.layout != PLAIN_LAYOUT:
        raise UserError(
            f"--root {root} has members {', '.join(manifest.members)}; the bench reads sets whose "
            "members are called jpg and txt"
        )
    if manifest.num_samples("train") < 8 * BATCH_SIZE or len(manifest.splits["train"]) < max(WORKERS):
        raise UserError(
            f"--root {root} has {manifest.num_samples('train')} training samples in {len(manifest.splits['train'])} "
            f"shards; give at least {8 * BATCH_SIZE} in {max(WORKERS)}"
        )
    storage, wanted = ShardStorage(str(root)), frozenset({"jpg", "txt"})
    found = (s for shard in manifest.splits["train"] for s in require_all(read_shard(storage, shard, wanted)))
    return DataSet(root, manifest, load_tokenizer(root, manifest.tokenizer), list(islice(found, _NUM_STAGED)))


def list_timed(data: DataSet, sizes: Sequence[int]) -> list["Timed"]:
    """Return all measurements: stages, ceilings, loaders, the peer, consumers."""
    by_size = [each for size in sizes for each in (*_sized(data, size), *_loaders(data, size))]
    return [*_stages(data), *by_size, *_consumers(data, sizes[0])]


def measure(timed: Sequence["Timed"], rounds: int, tick: Callable[[], None]) -> DataTimes:
    """Time all together, in random order each round; tick after each."""
    taken: dict[str, list[float]] = {each.name: [] for each in timed}

    def candidate(each: Timed) -> Candidate:
        return Candidate(each.name, lambda: taken[each.name].append(each.seconds_per_sample()))

    interleave([candidate(each) for each in timed], rounds, tick)
    return DataTimes({name: times[1:] for name, times in taken.items()})  # the first call only warms up


class Timed(NamedTuple):
    """A measurement.

    name: as in tables.
    seconds_per_sample: does the work once and returns its time.
    """

    name: str
    seconds_per_sample: Callable[[], float]


def _stage(name: str, num_samples: int, work: Callable[[], object]) -> Timed:
    def seconds_per_sample() -> float:
        start = time.process_time()
        work()
        return (time.process_time() - start) / num_samples

    return Timed(name, seconds_per_sample)


def _stages(data: DataSet) -> list[Timed]:
    """Return the stages that do not depend on the size of images."""
    num_samples = data.manifest.num_samples("train")
    wanted = frozenset({"jpg", "txt"})

    def read() -> None:
        for path in data.shards:
            file_sha256(path)

    def parse() -> None:
        for shard in data.manifest.splits["train"]:
            for _ in require_all(read_shard(ShardStorage(str(data.root)), shard, wanted)):
                pass

    captions = [decode_text(sample.members["txt"]) for sample in data.samples]

    def tokenise() -> None:
        for start in range(0, len(captions), BATCH_SIZE):
            data.tokenizer.encode(captions[start : start + BATCH_SIZE], _MAX_TEXT_LEN)

    return [
        _stage(READ, num_samples, read),
        _stage(PARSE, num_samples, parse),
        _stage(TOKENISE, len(captions), tokenise),
    ]


def _sized(data: DataSet, size: int) -> list[Timed]:
    """Return decoding, alone and with the stages after it, of samples in memory."""
    jpegs = [sample.members["jpg"] for sample in data.samples]
    decoded = simplejpeg.decode_jpeg(jpegs[0], "RGB", **jpeg_scaling(size))
    row_RYX = image_rows(1, size)[0]
    collate = Collate(data.manifest.members, data.tokenizer, size, _MAX_TEXT_LEN)

    def decode() -> None:
        for jpeg in jpegs:
            simplejpeg.decode_jpeg(jpeg, "RGB", **jpeg_scaling(size))

    def resize() -> None:
        for _ in jpegs:
            fit(decoded, size, row_RYX)

    def whole() -> None:
        for start in range(0, len(data.samples), BATCH_SIZE):
            collate(data.samples[start : start + BATCH_SIZE])

    return [
        _stage(name_timed(DECODE, size), len(jpegs), decode),
        _stage(name_timed(RESIZE, size), len(jpegs), resize),
        _stage(name_timed(COLLATE, size), len(jpegs), whole),
        *(Timed(name_timed(CEILING, size, workers), partial(_ceiling, jpegs, size, workers)) for workers in WORKERS),
    ]


def _decode_all(jpegs: Sequence[bytes], size: int) -> None:
    rows_BRYX = image_rows(BATCH_SIZE, size).unbind()
    for jpeg, row_RYX in zip(jpegs, cycle(rows_BRYX), strict=False):
        decode_image(jpeg, "jpg", size, into=row_RYX)


def _ceiling(jpegs: Sequence[bytes], size: int, num_workers: int) -> float:
    """Return seconds per image; several processes begin together, and the last one to finish counts."""
    if num_workers == 0:
        return _stage("", len(jpegs), lambda: _decode_all(jpegs, size)).seconds_per_sample()
    context = multiprocessing.get_context("fork")  # workers inherit the bytes, as in a loader
    begin, end = (context.Barrier(num_workers + 1) for _ in range(2))

    def work() -> None:
        torch.set_num_threads(1)
        _decode_all(jpegs[:8], size)
        begin.wait()
        _decode_all(jpegs, size)
        end.wait()

    workers = [context.Process(target=work) for _ in range(num_workers)]
    for worker in workers:
        worker.start()
    begin.wait()
    start = time.perf_counter()
    end.wait()
    seconds = time.perf_counter() - start
    for worker in workers:
        worker.join()
    return seconds / (num_workers * len(jpegs))


def _loaders(data: DataSet, size: int) -> list[Timed]:
    """Return whole epochs, ours and the peer's."""

    def ours(workers: int) -> float:
        return _steady(_loader(data, size, workers), _NUM_BATCHES, clock=_clock(workers))

    def plain(workers: int) -> float:
        batches = plain_batches(
            data.shards, data.tokenizer, size, _MAX_TEXT_LEN, BATCH_SIZE, _SHUFFLE_BUFFER, num_workers=workers
        )
        return _steady(batches, _NUM_BATCHES, clock=_clock(workers))

    return [
        *(Timed(name_timed(LOADER, size, workers), partial(ours, workers)) for workers in WORKERS),
        *(Timed(name_timed(PLAIN, size, workers), partial(plain, workers)) for workers in WORKERS),
    ]


def _loader(data: DataSet, size: int, workers: int) -> Iterable[object]:
    return ShardDataModule(
        root=str(data.root),
        batch_size=BATCH_SIZE,
        image_size=size,
        max_text_len=_MAX_TEXT_LEN,
        vocab_size=_ANY_VOCABULARY,
        num_workers=workers,
        shuffle_buffer=_SHUFFLE_BUFFER,
    ).train_dataloader()


def _clock(num_workers: int) -> Callable[[], float]:
    return time.perf_counter if num_workers else time.process_time


def _steady(
    batches: Iterable[object],
    limit: int,
    work: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return seconds per sample from the first batch to the last; `work` runs on each but the first."""
    iterator = iter(batches)
    next(iterator)
    start, number = clock(), 0
    for _ in islice(iterator, limit):
        number += 1
        if work is not None:
            work()
    return (clock() - start) / (number * BATCH_SIZE)


def _consumers(data: DataSet, size: int) -> list[Timed]:
    """Return a consumer of a fixed amount of work per batch: on one fixed batch, and fed by the loader."""
    work = fixed_work(CONSUMER_SECONDS)

    def fixed() -> float:
        return _steady([None] * (_NUM_CONSUMED + 1), _NUM_CONSUMED, work)

    def fed(workers: int) -> float:
        return _steady(_loader(data, size, workers), _NUM_CONSUMED, work)

    return [Timed(FIXED, fixed), *(Timed(name_timed(FED, size, workers), partial(fed, workers)) for workers in WORKERS)]


def fixed_work(seconds: float) -> Callable[[], object]:
    """Return matrix products that take about so long on this machine; later calls do the same amount of work.

    The time is that of the calling thread on its core, so that other processes do not make the work smaller.
    """
    matrix = torch.randn(192, 192) / 192**0.5

    def products(number: int) -> None:
        for _ in range(number):
            torch.mm(matrix, matrix)

    products(100)
    start = time.thread_time()
    products(400)
    number = max(1, round(400 * seconds / (time.thread_time() - start)))
    return lambda: products(number)
