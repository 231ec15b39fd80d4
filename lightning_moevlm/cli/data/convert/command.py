"""Converts a source to a set of shards, as a command: options that all kinds have, the outcome on the terminal.

A command is a record: its fields are the options, and calling it converts.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from rich.console import Console

from lightning_moevlm.data.storage.local import local_source, local_target

if TYPE_CHECKING:
    from lightning_moevlm.data.write.convert.bad_rows import BadCount
    from lightning_moevlm.data.write.convert.convert import Converted, ConvertOptions, SetOptions
    from lightning_moevlm.data.write.convert.sources.row_source import Source
    from lightning_moevlm.data.write.finish_set import Licence

ImageFormat = Literal["jpg", "png"]
AGAIN = "fix that, then run the same command to resume"


@dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """Common options.

    Args:
        out: Folder of the set; by default data/shards/NAME.
        licence: Licence of the data, such as "CC BY 4.0"; nothing is converted without one.
        licence_url: Address of the licence text.
        attribution: Attribution that the licence requires.
        name: Name of the set and prefix of its keys; by default that of the input.
        image_format: Images of this format are kept byte for byte, others are re-encoded.
        max_side: Largest longer side of an image, in pixels; larger ones are scaled. null keeps the size.
        samples_per_shard: Samples per tar file.
        vocab_size: Largest number of token ids, at least 260.
        max_bad: Largest number of bad rows or samples to leave out; with more, nothing is converted.
        jobs: Processes; by default one per processor. The set's bytes do not depend on them.
        force: Replace a set that was converted differently.
    """

    out: str | None = None
    licence: str | None = None
    licence_url: str = ""
    attribution: str = ""
    name: str | None = None
    image_format: ImageFormat = "jpg"
    max_side: int | None = None
    samples_per_shard: int = 1000
    vocab_size: int = 8192
    max_bad: int = 0
    jobs: int | None = None
    force: bool = False

    def __call__(self) -> None:
        """Convert; the options are checked before the input is read."""
        shared = self._collect()
        source = self._source()
        self._convert(source, self._target(source.name), shared)

    def _source(self) -> "Source":
        raise NotImplementedError

    def _target(self, name: str) -> Path:
        return local_target(f"data/shards/{name}" if self.out is None else self.out)

    def _collect(self) -> "Shared":
        from lightning_moevlm.data.write.convert.convert import ConvertOptions, SetOptions
        from lightning_moevlm.data.write.convert.shard_image import ImageOptions
        from lightning_moevlm.data.write.finish_set import Licence

        jobs = len(os.sched_getaffinity(0)) if self.jobs is None else self.jobs
        images = ImageOptions(self.image_format, self.max_side)
        return Shared(
            Licence(self.licence, self.licence_url, self.attribution),
            SetOptions(images, self.samples_per_shard, self.vocab_size),
            ConvertOptions(self.max_bad, jobs, self.force),
        )

    @staticmethod
    def _convert(source: "Source", target: Path, shared: "Shared") -> None:
        from lightning_moevlm.data.write.convert.convert import convert

        run_conversion(target, partial(convert, source, target, *shared))


class Shared(NamedTuple):
    """What the common options ask for."""

    licence: "Licence"
    set_options: "SetOptions"
    options: "ConvertOptions"


def images_folder(images: str | None) -> Path | None:
    """Return the folder of --images; None without it."""
    return None if images is None else local_source(images, "--images")


def run_conversion(out: Path, run: "Callable[[], Converted]", title: str = "left out") -> None:
    """Convert and print the outcome; `title` is that of the table of tolerated bad rows."""
    from lightning_moevlm.cli.output import print_built
    from lightning_moevlm.common.atomic_files import explain_write_errors
    from lightning_moevlm.data.write.convert.bad_rows import TooManyBadError

    try:
        with explain_write_errors(out, AGAIN):
            converted = run()
    except TooManyBadError as error:
        _show(error.counts, "bad rows; nothing was converted")
        raise
    if converted.left_out:
        _show(converted.left_out, title)
    print_built(str(out), "converted" if converted.built else None, converted.manifest)
    if converted.built:
        num_bad = sum(count.num_rows for count in converted.left_out)
        counted = f"{converted.num_rows:,} rows read, {converted.num_rows - num_bad:,} of them good, {num_bad:,} bad"
        for line in (counted, *converted.notes):
            Console(soft_wrap=True, highlight=False).print(line, markup=False)


def _show(counts: "tuple[BadCount, ...]", title: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("cause", "rows", "the first of them", title=title, title_justify="left")
    for count in counts:
        table.add_row(count.cause, f"{count.num_rows:,}", Text(f"{count.first.place}: {count.first.message}"))
    terminal = Console(stderr=True)
    (terminal if terminal.is_terminal else Console(stderr=True, width=160)).print(table)
