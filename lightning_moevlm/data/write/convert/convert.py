"""From a source's rows to a set of shards: look first, then write.

    1. rows       the table is read; bad rows are told before a picture is opened
    2. look       every picture is decoded and hashed, by several processes
    3. plan       the hash of what a sample shows gives its split; within a split samples are mixed by the hash of
                  their keys, since tables are often sorted; every shard is then a list of samples
    4. write      every shard is a task of its own, by several processes
    5. finish     tokenizer, licence, manifest; the folder is moved to its place

Each step is a function of the ones before it, so the number of processes and earlier attempts do not show in the
bytes. Rows lie on disk (`row_table`), and pictures are read twice: where a sample belongs is known when all are seen.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.progress import track
from lightning_moevlm.data.format.manifest import SPLITS, Manifest, ShardEntry, Split
from lightning_moevlm.data.text.tokenizer import check_vocab_size
from lightning_moevlm.data.write.build_set import existing_set, put_in_place
from lightning_moevlm.data.write.convert.bad_rows import BadCount, BadRows
from lightning_moevlm.data.write.convert.finish_set import (
    Contents,
    ConvertRecipe,
    Terms,
    finish,
    refuse_empty,
    usual_size,
)
from lightning_moevlm.data.write.convert.picture import Seen, Wish
from lightning_moevlm.data.write.convert.process_pool import in_order
from lightning_moevlm.data.write.convert.row_table import RowTable, row_table
from lightning_moevlm.data.write.convert.sources.row_source import BadRow, Source
from lightning_moevlm.data.write.convert.tasks import Fault, LookTask, Planned, ShardTask, look, write_shard
from lightning_moevlm.data.write.convert.work_folder import Workshop, workshop

VERSION = 1
LOOKED_AT_ONCE = 128
_TABLE = "rows.sqlite"


@dataclass(frozen=True)
class Form:
    """What decides about the set's bytes beside its source."""

    wish: Wish
    samples_per_shard: int
    vocab_size: int

    def __post_init__(self) -> None:
        """Refuse what no set can have, before anything is read."""
        if self.samples_per_shard < 1:
            raise UserError(f"samples_per_shard is {self.samples_per_shard}, but a shard needs at least 1")
        if self.wish.max_side is not None and self.wish.max_side < 8:
            raise UserError(f"max_side is {self.wish.max_side}, but must be at least 8 pixels, or null to keep sizes")
        check_vocab_size(self.vocab_size)


@dataclass(frozen=True)
class Effort:
    """What does not decide about the bytes: bad rows to bear, processes, whether to replace another set."""

    max_bad: int
    num_jobs: int
    force: bool

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing, before anything is read."""
        if self.max_bad < 0:
            raise UserError(f"max_bad is {self.max_bad}, but cannot be less than 0")
        if self.num_jobs < 1:
            raise UserError(f"jobs is {self.num_jobs}, but at least 1 process has to work")


class Converted(NamedTuple):
    """The set, whether anything had to be done for it, and what was left out.

    num_rows: of the source, bad ones included. notes: sentences to tell.
    """

    manifest: Manifest
    built: bool
    left_out: tuple[BadCount, ...]
    num_rows: int = 0
    notes: tuple[str, ...] = ()


def convert(source: Source, out: Path, terms: Terms, form: Form, effort: Effort) -> Converted:
    """Convert a source into a set of shards at `out`; the same arguments go on with a conversion that was killed.

    Raises:
        UserError: if `out` holds something else, more rows are bad than allowed, or a split stays empty.

    """
    recipe, wish = recipe_of(source, terms, form), form.wish
    found = existing_set(out, recipe, effort.force)
    if found is not None:
        return Converted(found, False, ())
    bad = BadRows(source.remedies)
    out.parent.mkdir(parents=True, exist_ok=True)
    with workshop(out, recipe.fingerprint) as shop, row_table(shop.folder / _TABLE) as table:
        num_rows = _fill(table, source, bad)
        bad.refuse_beyond(effort.max_bad, num_rows)
        if not table.num_rows:
            bad.refuse_beyond(0, num_rows)  # every row is bad, however many may be
            raise UserError(f"{source.name} has no rows to make samples of")
        _look_at_all(source, table, wish, effort.num_jobs, shop, bad)
        bad.refuse_beyond(effort.max_bad, num_rows)
        num_samples = table.sort()
        refuse_empty(num_samples)
        contents = Contents(
            image_size=usual_size(table.sides()),
            members=_members(next(table.samples("train")), wish),
            texts=table.texts("train"),
            splits=_write_all(source, table, num_samples, form, effort.num_jobs, shop),
            layout=source.layout,
        )
        manifest = finish(shop.folder, recipe, terms, contents, form.vocab_size)
        shop.tidy(_TABLE)
        put_in_place(shop.folder, out)
    return Converted(manifest, True, bad.counts(), num_rows, tuple(source.notes))


def recipe_of(source: Source, terms: Terms, form: Form) -> ConvertRecipe:
    """Return everything that decides about the bytes of a set."""
    arguments = {
        **source.arguments,
        **terms.as_arguments(),
        "image_format": form.wish.image_format,
        "max_side": form.wish.max_side or 0,
        "samples_per_shard": form.samples_per_shard,
        "vocab_size": form.vocab_size,
    }
    return ConvertRecipe(source.name, VERSION, arguments)


def _fill(table: RowTable, source: Source, bad: BadRows) -> int:
    """Take the rows that are good so far; all of them will have the same members. Return how many there were in all."""
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


def _look_at_all(source: Source, table: RowTable, wish: Wish, num_jobs: int, shop: Workshop, bad: BadRows) -> None:
    """Note what every row's picture is, and leave out the rows whose pictures cannot be used."""
    num_stretches = -(-table.num_rows // LOOKED_AT_ONCE)
    has_pictures = next(table.stretches(1))[0].picture is not None
    todo = {i for i in range(num_stretches) if _recalled(shop, i) is None} if has_pictures else set()
    tasks = (
        LookTask(source.folder, tuple(row.picture for row in rows if row.picture is not None), wish)
        for number, rows in enumerate(table.stretches(LOOKED_AT_ONCE))
        if number in todo
    )
    with closing(in_order(look, tasks, min(num_jobs, len(todo)))) as fresh:
        for number, rows in enumerate(track(table.stretches(LOOKED_AT_ONCE), num_stretches, "inspecting images")):
            if not has_pictures:
                table.see(rows, [None] * len(rows))
                continue
            found = next(fresh) if number in todo else _recalled(shop, number)
            assert found is not None and len(found) == len(rows)
            good = [(row, saw) for row, saw in zip(rows, found, strict=True) if not isinstance(saw, Fault)]
            if number in todo and len(good) == len(rows):
                shop.remember(_look(number), found)  # a bad picture may be mended, and is looked at again
            table.see([row for row, _ in good], [saw for _, saw in good])
            faulty = [(row, saw) for row, saw in zip(rows, found, strict=True) if isinstance(saw, Fault)]
            table.drop([row for row, _ in faulty])
            for row, fault in faulty:
                bad.add(BadRow(row.place, fault.cause, fault.message))


def _look(number: int) -> str:
    return f"look-{number:06d}"


def _recalled(shop: Workshop, number: int) -> tuple[Seen | Fault, ...] | None:
    noted = shop.recall(_look(number))
    return tuple(Seen(*entry) for entry in noted) if isinstance(noted, list) else None


def _members(sample: Planned, wish: Wish) -> tuple[str, ...]:
    """Every sample of a source has the same members."""
    found = (
        ("json", sample.annotation is not None),
        ("txt", sample.caption is not None),
        (wish.image_format, sample.picture is not None),
    )
    return tuple(sorted(extension for extension, there in found if there))


def _write_all(
    source: Source, table: RowTable, num_samples: dict[Split, int], form: Form, num_jobs: int, shop: Workshop
) -> dict[Split, tuple[ShardEntry, ...]]:
    num_shards = {split: -(-num // form.samples_per_shard) for split, num in num_samples.items()}
    names = [(split, f"{split}-{number:06d}") for split, num in num_shards.items() for number in range(num)]
    finished = {name: shop.finished_shard(name) for _, name in names}
    todo = {name for name, entry in finished.items() if entry is None}
    tasks = _tasks(source, table, names, todo, form, shop)
    entries: dict[Split, list[ShardEntry]] = {split: [] for split in SPLITS}
    with closing(in_order(write_shard, tasks, min(num_jobs, len(todo)))) as fresh:
        for split, name in track(names, len(names), "writing shards"):
            entry = finished[name]
            if entry is None:
                entry = next(fresh)
                shop.remember(name, list(asdict(entry).values()))
            entries[split].append(entry)
    return {split: tuple(found) for split, found in entries.items()}


def _tasks(
    source: Source, table: RowTable, names: list[tuple[Split, str]], todo: set[str], form: Form, shop: Workshop
) -> Iterator[ShardTask]:
    samples = {split: table.samples(split) for split in SPLITS}
    for split, name in names:
        chosen = tuple(islice(samples[split], form.samples_per_shard))
        if name in todo:
            yield ShardTask(source.folder, shop.folder / f"{name}.tar", chosen, form.wish)
