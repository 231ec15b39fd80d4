"""Keeps the rows of a conversion on disk: read in the source's order, then in the order of the shards.

Millions of rows do not fit into memory, and shards have another order than their table. An SQLite file in the work
folder sorts them without holding all of them. Each attempt makes it anew and removes it at its end.
"""

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.data.format.manifest import SPLITS, Split
from lightning_moevlm.data.write.convert.shard_image import InspectedImage
from lightning_moevlm.data.write.convert.sources.row_source import ImageLocation, Row
from lightning_moevlm.data.write.convert.tasks import PlannedImage, PlannedSample
from lightning_moevlm.data.write.set_folder import canonical_json
from lightning_moevlm.data.write.shard_writer import choose_split

_SETTINGS = """
pragma journal_mode = off;
pragma synchronous = off;
pragma temp_store = file;
pragma cache_size = -16384;  -- KiB
create table rows (
    number integer primary key, key text unique, captioned integer, content text,
    split text, sha256 text, side integer, turn blob
);
begin;
"""
"""No other process reads the file, so no journal is kept."""


class TableRow(NamedTuple):
    """The part of a row that inspection needs."""

    number: int  # in the source's order
    place: str
    images: tuple[ImageLocation, ...]
    identity: str  # of its content, if it has no image
    split: Split | None


class RowTable:
    """Good rows and the results of their inspection. num_captioned: rows with captions."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database
        self._has_annotations = False
        self.num_rows = 0
        self.num_captioned = 0

    def add(self, row: Row) -> str | None:
        """Add a row; if another row has its key, return that row's place."""
        annotation = None if row.annotation is None else canonical_json(row.annotation)
        content = json.dumps([row.place, row.images, row.caption, annotation, row.extra_texts, row.split])
        captioned = row.caption is not None
        values = (self.num_rows, row.key, captioned, content)
        found = self._db.execute(
            "insert or ignore into rows (number, key, captioned, content) values (?, ?, ?, ?)", values
        )
        if not found.rowcount:
            (other,) = self._db.execute("select content from rows where key = ?", (row.key,)).fetchone()
            return str(json.loads(other)[0])
        self.num_rows += 1
        self.num_captioned += captioned
        self._has_annotations |= annotation is not None
        return None

    def drop_uncaptioned(self) -> Iterator[str]:
        """Remove the rows without captions, and yield their places."""
        for (content,) in self._db.execute("select content from rows where not captioned order by number"):
            self.num_rows -= 1
            yield json.loads(content)[0]
        self._db.execute("delete from rows where not captioned")

    def chunks(self, length: int) -> Iterator[list[TableRow]]:
        """Yield all rows in order, `length` at a time; rows already yielded may be removed meanwhile."""
        last = -1
        while found := self._db.execute(
            "select number, key, content from rows where number > ? order by number limit ?", (last, length)
        ).fetchall():
            last = found[-1][0]
            yield [_parse_row(*values) for values in found]

    def record(self, rows: Sequence[TableRow], seen: Sequence[Sequence[InspectedImage]]) -> None:
        """Record the images of rows; the first of a row decides the split, unless the source has named it."""
        self._db.executemany(
            "update rows set split = ?, sha256 = ?, side = ? where number = ?",
            [
                (
                    row.split or choose_split(saw[0].sha256 if saw else row.identity),
                    " ".join(image.sha256 for image in saw),
                    saw[0].side if saw else None,
                    row.number,
                )
                for row, saw in zip(rows, seen, strict=True)
            ],
        )

    def drop(self, rows: Sequence[TableRow]) -> None:
        """Remove rows."""
        self._db.executemany("delete from rows where number = ?", [(row.number,) for row in rows])

    def sort(self) -> dict[Split, int]:
        """Sort all rows into the order of the shards; return the number of rows of each split."""
        self._db.create_function("turn", 1, lambda key: hashlib.sha256(key.encode()).digest(), deterministic=True)
        self._db.execute("update rows set turn = turn(key)")
        self._db.execute("create index by_turn on rows (split, turn)")
        found = dict(self._db.execute("select split, count(*) from rows group by split"))
        return {split: found.get(split, 0) for split in SPLITS}

    def sides(self) -> Counter[int]:
        """Return the number of images by shorter side, pixels."""
        found = self._db.execute("select side, count(*) from rows where side is not null group by side")
        return Counter(dict(found))

    def samples(self, split: Split) -> Iterator[PlannedSample]:
        """Yield a split's samples in the order of its shards."""
        query = "select key, content, sha256 from rows where split = ? order by turn"
        for key, content, sha256 in self._db.execute(query, (split,)):
            place, images, caption, annotation, _, _ = json.loads(content)
            if annotation is None and self._has_annotations:
                annotation = canonical_json({})  # all samples of a set have the same members
            planned = tuple(
                PlannedImage(ImageLocation(*image), digest)
                for image, digest in zip(images, sha256.split(), strict=True)
            )
            yield PlannedSample(key, place, planned, caption, annotation)

    def texts(self, split: Split) -> Iterator[str]:
        """Yield a split's texts for the tokenizer, in the order of its samples."""
        for (content,) in self._db.execute("select content from rows where split = ? order by turn", (split,)):
            _, _, caption, _, extra_texts, _ = json.loads(content)
            yield from (*(() if caption is None else (caption,)), *extra_texts)


@contextmanager
def row_table(path: Path) -> Iterator[RowTable]:
    """Make an empty table in a file, and remove the file at the end."""
    path.unlink(missing_ok=True)
    try:
        # tokenizers reads texts in a thread of its own, while this one waits
        with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as database:
            database.executescript(_SETTINGS)
            yield RowTable(database)
    finally:
        path.unlink(missing_ok=True)


def _parse_row(number: int, key: str, content: str) -> TableRow:
    place, images, caption, _, extra_texts, split = json.loads(content)
    located = tuple(ImageLocation(*image) for image in images)
    return TableRow(number, place, located, caption or "\n".join(extra_texts) or key, split)
