"""Converts a source's rows to a set of shards: inspects all images first, then writes.

    1. rows       read the table; bad rows are found before an image is opened
    2. inspect    decode and hash every image, in several processes
    3. plan       the hash of a sample's content gives its split; within a split samples are ordered by the hash of
                  their keys, because tables are often sorted; a shard is a list of samples
    4. write      write every shard as a task of its own, in several processes
    5. finish     write tokenizer, licence and manifest, and move the folder to its place

Each step is a function of the steps before it, so the bytes depend neither on the number of processes nor on earlier
attempts. Rows are kept on disk (`row_table`). Images are read twice, because places are known when all are inspected.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.common.progress import track
from lightning_moevlm.data.format.manifest import SPLITS, Manifest, ShardEntry, Split
from lightning_moevlm.data.text.tokenizer import check_vocab_size
from lightning_moevlm.data.write.convert.bad_rows import BadCount, BadRows
from lightning_moevlm.data.write.convert.process_pool import map_in_order
from lightning_moevlm.data.write.convert.row_table import RowTable, row_table
from lightning_moevlm.data.write.convert.shard_image import ImageOptions, InspectedImage
from lightning_moevlm.data.write.convert.sources.row_source import BadRow, Source
from lightning_moevlm.data.write.convert.tasks import (
    Fault,
    InspectTask,
    PlannedSample,
    ShardTask,
    image_members,
    inspect_images,
    write_shard,
)
from lightning_moevlm.data.write.convert.work_folder import WorkFolder, open_work_folder
from lightning_moevlm.data.write.finish_set import (
    Contents,
    Licence,
    finish_set,
    refuse_empty,
    typical_size,
)
from lightning_moevlm.data.write.set_folder import Recipe, find_existing_set, put_in_place

VERSION = 1
INSPECTED_AT_ONCE = 128
_TABLE = "rows.sqlite"
_Images = tuple[InspectedImage, ...]


@dataclass(frozen=True)
class SetOptions:
    """Options that determine the set's bytes, besides the source and the licence."""

    image_options: ImageOptions
    samples_per_shard: int
    vocab_size: int

    def __post_init__(self) -> None:
        """Refuse invalid values before anything is read."""
        check_number("samples_per_shard", self.samples_per_shard, least=1)
        if self.image_options.max_side is not None:
            check_number("max_side", self.image_options.max_side, least=8, advice=" pixels, or null to keep sizes")
        check_vocab_size(self.vocab_size)


@dataclass(frozen=True)
class ConvertOptions:
    """Options that do not change the set's bytes."""

    max_bad: int  # bad rows to leave out at most
    num_jobs: int  # processes
    force: bool  # replace another set

    def __post_init__(self) -> None:
        """Refuse invalid values before anything is read."""
        check_number("max_bad", self.max_bad, least=0)
        check_number("jobs", self.num_jobs, least=1)


class Converted(NamedTuple):
    """The result of a conversion."""

    manifest: Manifest
    built: bool  # False if the set existed already
    left_out: tuple[BadCount, ...]
    num_rows: int = 0  # of the source, bad ones included
    notes: tuple[str, ...] = ()  # sentences to print


def convert(source: Source, out: Path, licence: Licence, set_options: SetOptions, effort: ConvertOptions) -> Converted:
    """Convert a source to a set of shards at `out`; the same arguments resume a killed conversion.

    Raises:
        UserError: if `out` holds something else, more rows are bad than allowed, or a split stays empty.
    """
    recipe, image_options = make_recipe(source, licence, set_options), set_options.image_options
    found = find_existing_set(out, recipe, effort.force)
    if found is not None:
        return Converted(found, False, ())
    bad = BadRows(source.remedies)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_work_folder(out, recipe.fingerprint) as work, row_table(work.folder / _TABLE) as table:
        num_rows = _fill(table, source, bad)
        bad.refuse_beyond(effort.max_bad, num_rows)
        if not table.num_rows:
            bad.refuse_beyond(0, num_rows)  # every row is bad
            raise UserError(f"{source.name} has no rows: give a source with at least one sample")
        _inspect_all(source, table, image_options, effort.num_jobs, work, bad)
        bad.refuse_beyond(effort.max_bad, num_rows)
        num_samples = table.sort()
        refuse_empty(num_samples)
        contents = Contents(
            image_size=typical_size(table.sides()),
            members=_members(next(table.samples("train")), image_options),
            texts=table.texts("train"),
            splits=_write_all(source, table, num_samples, set_options, effort.num_jobs, work),
            layout=source.layout,
            tokenizer_file=source.tokenizer_file,
        )
        manifest = finish_set(work.folder, recipe, licence, contents, set_options.vocab_size)
        work.tidy(_TABLE)
        put_in_place(work.folder, out)
    return Converted(manifest, True, bad.counts(), num_rows, tuple(source.notes))


def make_recipe(source: Source, licence: Licence, set_options: SetOptions) -> Recipe:
    """Return everything that determines the bytes of a set."""
    arguments = {
        **source.arguments,
        **licence.as_arguments(),
        "image_format": set_options.image_options.image_format,
        "max_side": set_options.image_options.max_side or 0,
        "samples_per_shard": set_options.samples_per_shard,
        "vocab_size": set_options.vocab_size,
    }
    return Recipe(source.name, VERSION, arguments)


def _fill(table: RowTable, source: Source, bad: BadRows) -> int:
    """Add good rows to the table, all with the same members; return the number of all rows."""
    num_rows = 0
    for row in source.rows():
        num_rows += 1
        if isinstance(row, BadRow):
            bad.add(row)
            continue
        place = table.add(row)
        if place is not None:
            bad.add(BadRow(row.place, "duplicate_key", f"key {row.key} occurred before, in {place}"))
    if 0 < table.num_captioned < table.num_rows:
        for place in table.drop_uncaptioned():
            bad.add(BadRow(place, "member_missing", "no caption, while others have one"))
    return num_rows


def _inspect_all(
    source: Source, table: RowTable, image_options: ImageOptions, num_jobs: int, work: WorkFolder, bad: BadRows
) -> None:
    """Inspect every row's image, and drop rows with invalid images."""
    num_chunks = -(-table.num_rows // INSPECTED_AT_ONCE)
    per_row = len(next(table.chunks(1))[0].images)  # the same for all rows
    has_images = per_row > 0
    todo = {i for i in range(num_chunks) if work.recall(_task_name(i), _Images) is None} if has_images else set()
    tasks = (
        InspectTask(source.folder, tuple(image for row in rows for image in row.images), image_options)
        for number, rows in enumerate(table.chunks(INSPECTED_AT_ONCE))
        if number in todo
    )
    with closing(map_in_order(inspect_images, tasks, min(num_jobs, len(todo)))) as fresh:
        for number, rows in enumerate(track(table.chunks(INSPECTED_AT_ONCE), num_chunks, "inspecting images")):
            if not has_images:
                table.record(rows, [()] * len(rows))
                continue
            found = next(fresh) if number in todo else work.recall(_task_name(number), _Images)
            assert found is not None and len(found) == len(rows) * per_row
            by_row = [(row, found[i * per_row : (i + 1) * per_row]) for i, row in enumerate(rows)]
            whole = [(row, [each for each in saw if not isinstance(each, Fault)]) for row, saw in by_row]
            good = [(row, seen) for row, seen in whole if len(seen) == per_row]
            if number in todo and len(good) == len(rows):
                work.remember(_task_name(number), found)  # bad images are inspected again: they may be corrected
            table.record([row for row, _ in good], [seen for _, seen in good])
            for row, saw in by_row:
                fault = next((each for each in saw if isinstance(each, Fault)), None)
                if fault is not None:
                    table.drop([row])
                    bad.add(BadRow(row.place, fault.cause, fault.message))


def _task_name(number: int) -> str:
    return f"images-{number:06d}"


def _members(sample: PlannedSample, image_options: ImageOptions) -> tuple[str, ...]:
    """Return the members of a sample; all samples of a source have the same."""
    texts = (("json", sample.annotation), ("txt", sample.caption))
    found = [extension for extension, content in texts if content is not None]
    return tuple(sorted([*found, *image_members(len(sample.images), image_options.image_format)]))


def _write_all(
    source: Source,
    table: RowTable,
    num_samples: dict[Split, int],
    set_options: SetOptions,
    num_jobs: int,
    work: WorkFolder,
) -> dict[Split, tuple[ShardEntry, ...]]:
    num_shards = {split: -(-num // set_options.samples_per_shard) for split, num in num_samples.items()}
    names = [(split, f"{split}-{number:06d}") for split, num in num_shards.items() for number in range(num)]
    finished = {name: work.finished_shard(name) for _, name in names}
    todo = {name for name, entry in finished.items() if entry is None}
    tasks = _tasks(source, table, names, todo, set_options, work)
    entries: dict[Split, list[ShardEntry]] = {split: [] for split in SPLITS}
    with closing(map_in_order(write_shard, tasks, min(num_jobs, len(todo)))) as fresh:
        for split, name in track(names, len(names), "writing shards"):
            entry = finished[name]
            if entry is None:
                entry = next(fresh)
                work.remember(name, entry)
            entries[split].append(entry)
    return {split: tuple(found) for split, found in entries.items()}


def _tasks(
    source: Source,
    table: RowTable,
    names: list[tuple[Split, str]],
    todo: set[str],
    set_options: SetOptions,
    work: WorkFolder,
) -> Iterator[ShardTask]:
    samples = {split: table.samples(split) for split in SPLITS}
    for split, name in names:
        chosen = tuple(islice(samples[split], set_options.samples_per_shard))
        if name in todo:
            yield ShardTask(source.folder, work.folder / f"{name}.tar", chosen, set_options.image_options)
