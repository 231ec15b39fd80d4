"""Converts tables and downloads of images with captions."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lightning_moevlm.cli.data.convert.command import AGAIN, ConvertCommand, images_folder, run_conversion
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.storage.local import local_source

if TYPE_CHECKING:
    from lightning_moevlm.data.write.convert.sources.row_source import Source

_STAY = "bad samples, which stay in their tars: train with data.max_lost_fraction above 0"


@dataclass(frozen=True)
class ConvertCsv(ConvertCommand):
    """Convert a CSV file and the folder of images that it names. All other columns go to the json member.

    Args:
        table: The CSV file; its first line names the columns.
        images: Folder that image paths are relative to; by default the table's own. Paths may not leave it.
        image_column: Column of image paths; null for a set of texts alone.
        caption_column: Column of captions; null for a set of images alone.
        key_column: Column of sample keys (letters, digits, - and _); by default rows are numbered.
        split_column: Column with train, val or test; by default the hash of the image decides, 80, 10 and 10 %.
        delimiter: Character between fields.
        encoding: Encoding of the table, such as cp1252 for tables from Windows.
        quotes: Whether fields may be quoted; null reads them so, and refuses a table in which a
            quoted field seems to contain whole rows.
    """

    table: str
    images: str | None = None
    image_column: str | None = "image"
    caption_column: str | None = "caption"
    key_column: str | None = None
    split_column: str | None = None
    delimiter: str = ","
    encoding: str = "utf-8"
    quotes: bool | None = None

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.csv_format import CsvFormat
        from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, CsvSource

        columns = Columns(self.image_column, self.caption_column, self.key_column, self.split_column)
        # a shell passes a tab as \\t
        written = CsvFormat("\t" if self.delimiter == "\\t" else self.delimiter, self.encoding, self.quotes)
        table = local_source(self.table, "table")
        return CsvSource(table, images_folder(self.images), self.name, columns, written)


@dataclass(frozen=True)
class ConvertJsonl(ConvertCommand):
    """Convert a file of JSON objects, one per line, and the folder of images that it names.

    Args:
        table: The file, UTF-8. All other fields go to the json member.
        images: Folder that image paths are relative to; by default the table's own. Paths may not leave it.
        image_field: Field of image paths; null for a set of texts alone.
        caption_field: Field of captions; null for a set of images alone.
        key_field: Field of sample keys (letters, digits, - and _); by default lines are numbered.
        split_field: Field with train, val or test; by default the hash of the image decides, 80, 10 and 10 %.
    """

    table: str
    images: str | None = None
    image_field: str | None = "image"
    caption_field: str | None = "caption"
    key_field: str | None = None
    split_field: str | None = None

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, JsonlSource

        columns = Columns(self.image_field, self.caption_field, self.key_field, self.split_field)
        return JsonlSource(local_source(self.table, "table"), images_folder(self.images), self.name, columns)


@dataclass(frozen=True)
class ConvertImg2dataset(ConvertCommand):
    """Make a set from img2dataset's downloads (--output_format webdataset) or any WebDataset tars.

    The tars stay as they are: they are linked into the set or, if --out is their own folder, get a manifest beside
    them. Whole tars then fall into the splits. Bad samples stay in their tars, so training needs data.max_lost_fraction
    above 0. --keep_tars false writes the good samples again, mixed and split by image.

    Args:
        folder: The folder with 00000.tar, 00000_stats.json and so on; without any statistics, with tars of any name.
        keep_tars: Whether the tars stay as they are. --image_format, --max_side and --samples_per_shard require
            --keep_tars false.
        recompress: Whether compressed tars (gzip, bzip2, xz) are unpacked into the set; they are refused otherwise.
        image_member: Extension of the images, as input.jpg for KEY.input.jpg; null takes jpg, png and webp.
        caption_member: Extension of the captions; null for a set of images alone.
        caption_field: Field of KEY.json with the caption, or with a list of captions; each epoch draws one, and
            evaluation counts all.
    """

    folder: str
    keep_tars: bool = True
    recompress: bool = False
    image_member: str | None = None
    caption_member: str | None = "txt"
    caption_field: str | None = None

    def __call__(self) -> None:
        """Convert, or describe the tars."""
        from lightning_moevlm.common.atomic_files import explain_write_errors
        from lightning_moevlm.data.write.convert.keep_tars import keep_tars
        from lightning_moevlm.data.write.convert.sources.img2dataset import Img2datasetSource
        from lightning_moevlm.data.write.convert.sources.member_names import MemberNames
        from lightning_moevlm.data.write.convert.sources.row_source import make_set_name, require_folder
        from lightning_moevlm.data.write.convert.sources.unpack import refuse_compressed, unpack_tars

        shared = self._collect()
        members = MemberNames(self.image_member, self.caption_member, self.caption_field)
        if self.keep_tars and (self.image_format, self.max_side, self.samples_per_shard) != ("jpg", None, 1000):
            raise UserError(
                "--image_format, --max_side and --samples_per_shard require --keep_tars false: add it, or leave them "
                "out"
            )
        tars = require_folder(local_source(self.folder, "folder"), "folder")
        name = make_set_name(self.name or tars.resolve().name)
        target = self._target(name)
        if not self.recompress:
            refuse_compressed(tars)
        unpacked = unpack_tars(tars, target) if self.recompress else nullcontext(tars)
        with explain_write_errors(target, AGAIN), unpacked as plain:
            if self.keep_tars:
                run = partial(keep_tars, plain, name, target, shared.licence, self.vocab_size, shared.options, members)
                run_conversion(target, run, _STAY)
            else:
                self._convert(Img2datasetSource(plain, name, members), target, shared)
