"""From a source's rows to a set of shards: look first, then write.

    1. rows       the table is read; bad rows are told before a picture is opened
    2. look       every picture is decoded and hashed, by several processes
    3. plan       the hash of what a sample shows gives its split; within a split samples are mixed by the hash of
                  their keys, since tables are often sorted; every shard is then a list of samples
    4. write      every shard is a task of its own, by several processes
    5. finish     tokenizer, licence, manifest; the folder is moved to its place

Each step is a function of the ones before it, so the number of processes and earlier attempts do not show in the
bytes. Rows are held in memory (about a kilobyte each), pictures never.
"""

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.errors import UserError
from lightning_moevlm.shards.build import canonical_json, existing_set, put_in_place
from lightning_moevlm.shards.convert.bad_rows import BadCount, BadRows
from lightning_moevlm.shards.convert.finish import (
    Contents,
    ConvertRecipe,
    Terms,
    finish,
    refuse_empty,
    usual_size,
)
from lightning_moevlm.shards.convert.picture import Seen, Wish
from lightning_moevlm.shards.convert.pool import in_order
from lightning_moevlm.shards.convert.rows import BadRow, Row, Source
from lightning_moevlm.shards.convert.work import Fault, LookTask, Planned, ShardTask, look, write_shard
from lightning_moevlm.shards.convert.workshop import Workshop, workshop
from lightning_moevlm.shards.manifest import SPLITS, Manifest, ShardEntry, Split
from lightning_moevlm.shards.progress import track
from lightning_moevlm.shards.tokenizer import check_vocab_size
from lightning_moevlm.shards.writer import split_of

VERSION = 1
LOOKED_AT_ONCE = 128


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
    """The set, whether anything had to be done for it, and what was left out."""

    manifest: Manifest
    built: bool
    left_out: tuple[BadCount, ...]


def convert(source: Source, out: Path, terms: Terms, form: Form, effort: Effort) -> Converted:
    """Convert a source into a set of shards at `out`; the same arguments go on with a conversion that was killed.

    Raises:
        UserError: if `out` holds something else, more rows are bad than allowed, or a split stays empty.

    """
    recipe, wish = recipe_of(source, terms, form), form.wish
    found = existing_set(out, recipe, effort.force)
    if found is not None:
        return Converted(found, False, ())
    bad = BadRows()
    rows = _rows(source, bad)
    bad.refuse_beyond(effort.max_bad)
    if not rows:
        raise UserError(f"{source.name} has no rows to make samples of")
    out.parent.mkdir(parents=True, exist_ok=True)
    with workshop(out, recipe.fingerprint) as shop:
        seen = _look_at_all(source, rows, wish, effort.num_jobs, shop)
        for row, result in zip(rows, seen, strict=True):
            if isinstance(result, Fault):
                bad.add(BadRow(row.place, result.cause, result.message))
        bad.refuse_beyond(effort.max_bad)
        good = [(row, result) for row, result in zip(rows, seen, strict=True) if not isinstance(result, Fault)]
        planned = _plan(good)
        refuse_empty({split: len(chosen) for split, chosen in planned.items()})
        contents = Contents(
            image_size=usual_size(result.side for _, result in good if result is not None),
            members=_members(good[0][0], wish),
            texts=(text for row in planned["train"] for text in row.texts),
            splits=_write_all(source, planned, form, effort.num_jobs, shop),
        )
        manifest = finish(shop.folder, recipe, terms, contents, form.vocab_size)
        shop.tidy()
        put_in_place(shop.folder, out)
    return Converted(manifest, True, bad.counts())


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


def _rows(source: Source, bad: BadRows) -> list[Row]:
    """Return the rows that are good so far; all of them have the same members."""
    rows: list[Row] = []
    places: dict[str, str] = {}
    for row in source.rows():
        if isinstance(row, BadRow):
            bad.add(row)
        elif row.key in places:
            bad.add(BadRow(row.place, "duplicate_key", f"key {row.key} occurred before, in {places[row.key]}"))
        else:
            places[row.key] = row.place
            rows.append(row)
    if any(row.annotation is not None for row in rows):
        rows = [row if row.annotation is not None else row._replace(annotation={}) for row in rows]
    captioned = [row for row in rows if row.caption is not None]
    if captioned and len(captioned) < len(rows):
        for row in (row for row in rows if row.caption is None):
            bad.add(BadRow(row.place, "member_missing", "no caption, while others have one"))
        return captioned
    return rows


def _look_at_all(
    source: Source, rows: Sequence[Row], wish: Wish, num_jobs: int, shop: Workshop
) -> list[Seen | Fault | None]:
    """Return what every row's picture is; None where the source has no pictures."""
    if rows[0].picture is None:
        return [None] * len(rows)
    stretches = [rows[start : start + LOOKED_AT_ONCE] for start in range(0, len(rows), LOOKED_AT_ONCE)]
    known = [_recalled(shop.recall(f"look-{i:06d}"), len(stretch)) for i, stretch in enumerate(stretches)]
    tasks = [
        LookTask(source.folder, tuple(row.picture for row in stretch if row.picture is not None), wish)
        for stretch, result in zip(stretches, known, strict=True)
        if result is None
    ]
    seen: list[Seen | Fault | None] = []
    with closing(in_order(look, tasks, min(num_jobs, len(tasks)))) as fresh:
        for number, earlier in enumerate(track(known, len(known), "looking at pictures")):
            result = next(fresh) if earlier is None else earlier
            if earlier is None and not any(isinstance(entry, Fault) for entry in result):
                shop.remember(f"look-{number:06d}", result)  # a bad picture may be mended, and is looked at again
            seen += result
    return seen


def _recalled(noted: object, length: int) -> tuple[Seen | Fault, ...] | None:
    if not isinstance(noted, list) or len(noted) != length:
        return None
    return tuple(Seen(*entry) for entry in noted)


class _Chosen(NamedTuple):
    """A row that becomes a sample. texts: what the tokenizer learns from it."""

    sample: Planned
    texts: tuple[str, ...]


def _plan(good: Sequence[tuple[Row, Seen | None]]) -> dict[Split, list[_Chosen]]:
    planned: dict[Split, list[_Chosen]] = {split: [] for split in SPLITS}
    for row, seen in sorted(good, key=lambda pair: hashlib.sha256(pair[0].key.encode()).digest()):
        identity = row.caption if seen is None else seen.sha256
        annotation = None if row.annotation is None else canonical_json(row.annotation)
        sha256 = "" if seen is None else seen.sha256
        sample = Planned(row.key, row.place, row.picture, sha256, row.caption, annotation)
        texts = (*(() if row.caption is None else (row.caption,)), *row.words)
        planned[row.split or split_of(identity or row.key)].append(_Chosen(sample, texts))
    return planned


def _members(row: Row, wish: Wish) -> tuple[str, ...]:
    """Every row of a source has the same members."""
    found = (
        ("json", row.annotation is not None),
        ("txt", row.caption is not None),
        (wish.image_format, row.picture is not None),
    )
    return tuple(sorted(extension for extension, there in found if there))


def _write_all(
    source: Source, planned: dict[Split, list[_Chosen]], form: Form, num_jobs: int, shop: Workshop
) -> dict[Split, tuple[ShardEntry, ...]]:
    tasks: list[ShardTask] = []
    splits: list[Split] = []
    for split, chosen in planned.items():
        for number, start in enumerate(range(0, len(chosen), form.samples_per_shard)):
            samples = tuple(each.sample for each in chosen[start : start + form.samples_per_shard])
            tasks.append(ShardTask(source.folder, shop.folder / f"{split}-{number:06d}.tar", samples, form.wish))
            splits.append(split)
    finished = [shop.finished_shard(task.target.stem) for task in tasks]
    todo = [task for task, entry in zip(tasks, finished, strict=True) if entry is None]
    entries: dict[Split, list[ShardEntry]] = {split: [] for split in SPLITS}
    with closing(in_order(write_shard, todo, min(num_jobs, len(todo)))) as fresh:
        for number, task in enumerate(track(tasks, len(tasks), "writing shards")):
            entry = finished[number]
            if entry is None:
                entry = next(fresh)
                shop.remember(task.target.stem, list(asdict(entry).values()))
            entries[splits[number]].append(entry)
    return {split: tuple(found) for split, found in entries.items()}
