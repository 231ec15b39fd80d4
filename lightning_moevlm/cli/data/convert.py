"""`moevlm data convert`: sets of shards from images and captions in other formats.

A command is a record: its fields are the options, and calling it converts. The options of `_Convert` are common to all.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from rich.console import Console

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.storage.local import local_source, local_target

if TYPE_CHECKING:
    from lightning_moevlm.data.write.convert.bad_rows import BadCount
    from lightning_moevlm.data.write.convert.convert import Converted, ConvertOptions, SetOptions
    from lightning_moevlm.data.write.convert.finish_set import Licence
    from lightning_moevlm.data.write.convert.sources.row_source import Source

ImageFormat = Literal["jpg", "png"]
_AGAIN = "fix that, then run the same command to resume"
_STAY = "bad samples, which stay in their tars: train with data.max_lost_fraction above 0"


@dataclass(frozen=True, kw_only=True)
class _Convert:
    """Common options.

    Args:
        out: Folder of the set; by default data/shards/NAME.
        licence: Licence of the data, such as "CC BY 4.0". Required.
        licence_url: Address of the licence text.
        attribution: Attribution that the licence requires.
        name: Name of the set and prefix of its keys; by default that of the source.
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
        """Convert; the options are checked before the source is read."""
        shared = self._collect()
        source = self._source()
        self._convert(source, self._target(source.name), shared)

    def _source(self) -> "Source":
        raise NotImplementedError

    def _target(self, name: str) -> Path:
        return local_target(f"data/shards/{name}" if self.out is None else self.out, "--out")

    def _collect(self) -> "_Shared":
        from lightning_moevlm.data.write.convert.convert import ConvertOptions, SetOptions
        from lightning_moevlm.data.write.convert.finish_set import Licence
        from lightning_moevlm.data.write.convert.shard_image import ImageOptions

        jobs = len(os.sched_getaffinity(0)) if self.jobs is None else self.jobs
        images = ImageOptions(self.image_format, self.max_side)
        return _Shared(
            Licence(self.licence, self.licence_url, self.attribution),
            SetOptions(images, self.samples_per_shard, self.vocab_size),
            ConvertOptions(self.max_bad, jobs, self.force),
        )

    @staticmethod
    def _convert(source: "Source", target: Path, shared: "_Shared") -> None:
        from lightning_moevlm.data.write.convert.convert import convert

        _run(target, partial(convert, source, target, *shared))


class _Shared(NamedTuple):
    licence: "Licence"
    set_options: "SetOptions"
    options: "ConvertOptions"


@dataclass(frozen=True)
class ConvertCsv(_Convert):
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
        return CsvSource(table, _folder(self.images), self.name, columns, written)


@dataclass(frozen=True)
class ConvertJsonl(_Convert):
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
        return JsonlSource(local_source(self.table, "table"), _folder(self.images), self.name, columns)


@dataclass(frozen=True)
class ConvertCocoCaptions(_Convert):
    """Convert a COCO captions file (captions_train2017.json and the like) and its folder of images.

    Args:
        annotations: The captions file.
        images: Folder of the images; by default the file's own.
        captions: first makes one sample per image, each one per caption; draw is one per image as well, and each
            epoch draws one of its captions. All captions are in the json member.
    """

    annotations: str
    images: str | None = None
    captions: Literal["first", "each", "draw"] = "first"

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.coco import CocoCaptions

        file = local_source(self.annotations, "annotations")
        return CocoCaptions(file, _folder(self.images) or file.parent, self.name, self.captions)


@dataclass(frozen=True)
class ConvertCocoVqa(_Convert):
    """Convert questions and answers in COCO's style (VQA v1, v2): one sample per image, questions in its json.

    Args:
        questions: The questions file.
        annotations: The file with the answers.
        images: Folder of the images; by default the questions' own.
        image_name: Pattern of image names; by default COCO_SUBTYPE_{image_id:012d}.jpg.
        captions: A COCO captions file of the same images; adds its captions and takes the image names from it.
    """

    questions: str
    annotations: str
    images: str | None = None
    image_name: str | None = None
    captions: str | None = None

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.coco import CocoQuestions

        questions = local_source(self.questions, "questions")
        answers = local_source(self.annotations, "annotations")
        captions = None if self.captions is None else local_source(self.captions, "--captions")
        images = _folder(self.images) or questions.parent
        return CocoQuestions(questions, answers, images, self.name, self.image_name, captions)


@dataclass(frozen=True)
class ConvertImg2dataset(_Convert):
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
        caption_field: Field of KEY.json with the caption, or with a list of captions; each epoch draws one.
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
        with explain_write_errors(target, _AGAIN), unpacked as plain:
            if self.keep_tars:
                run = partial(keep_tars, plain, name, target, shared.licence, self.vocab_size, shared.options, members)
                _run(target, run, _STAY)
            else:
                self._convert(Img2datasetSource(plain, name, members), target, shared)


@dataclass(frozen=True)
class ConvertQuestions(_Convert):
    """Make a set with one sample per question of another set (scenes, coco_vqa), with a copy of its image.

    Splits and tokenizer are the other set's; --vocab_size is not used.

    Args:
        folder: Folder of the other set.
    """

    folder: str

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.sets.questions import SetQuestions

        return SetQuestions(local_source(self.folder, "folder"), self.name)


@dataclass(frozen=True)
class ConvertStatements(_Convert):
    """Make a set of true and false statements about pairs of images of a set of scenes, with copies of both.

    Every text comes twice, once true and once false of its images. Splits and tokenizer are the other set's;
    --vocab_size is not used.

    Args:
        folder: Folder of the set of scenes.
        per_image: Statements for each image of the set, on average.
        seed: Other seeds give other pairs and texts.
    """

    folder: str
    per_image: float = 1.0
    seed: int = 0

    def _source(self) -> "Source":
        from lightning_moevlm.data.write.convert.sources.sets.statements import SetStatements

        return SetStatements(local_source(self.folder, "folder"), self.name, self.per_image, self.seed)


COMMANDS: dict[str, Callable[..., object]] = {
    "csv": ConvertCsv,
    "jsonl": ConvertJsonl,
    "coco_captions": ConvertCocoCaptions,
    "coco_vqa": ConvertCocoVqa,
    "img2dataset": ConvertImg2dataset,
    "questions": ConvertQuestions,
    "statements": ConvertStatements,
}


def _folder(images: str | None) -> Path | None:
    return None if images is None else local_source(images, "--images")


def _run(out: Path, run: "Callable[[], Converted]", title: str = "left out") -> None:
    """Convert and print the outcome; `title` is that of the table of tolerated bad rows."""
    from lightning_moevlm.cli.output import print_built
    from lightning_moevlm.common.atomic_files import explain_write_errors
    from lightning_moevlm.data.write.convert.bad_rows import TooManyBadError

    try:
        with explain_write_errors(out, _AGAIN):
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
