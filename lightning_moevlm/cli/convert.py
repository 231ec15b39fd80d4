"""`moevlm data convert`: sets of shards from images and captions that lie in other forms.

What is common to every kind stands under the same name in each: --out, --licence, --image_format, --max_side and so on.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
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


def convert_csv(
    table: str,
    images: str | None = None,
    out: str | None = None,
    licence: str | None = None,
    licence_url: str = "",
    attribution: str = "",
    name: str | None = None,
    image_column: str | None = "image",
    caption_column: str | None = "caption",
    key_column: str | None = None,
    split_column: str | None = None,
    delimiter: str = ",",
    encoding: str = "utf-8",
    quotes: bool | None = None,
    image_format: ImageFormat = "jpg",
    max_side: int | None = None,
    samples_per_shard: int = 1000,
    vocab_size: int = 8192,
    max_bad: int = 0,
    jobs: int | None = None,
    force: bool = False,
) -> None:
    """Convert a CSV file and the folder of images that it names. Columns without a meaning go to the json member.

    Args:
        table: The CSV file; its first line names the columns.
        images: Folder that image paths are relative to; by default the table's own. Paths may not leave it.
        out: Folder of the set; by default data/shards/NAME.
        licence: Licence of the data, such as "CC BY 4.0". Required.
        licence_url: Address of the licence text.
        attribution: Attribution that the licence requires.
        name: Name of the set and prefix of its keys; by default the table's name.
        image_column: Column of image paths; null for a set of texts alone.
        caption_column: Column of captions; null for a set of images alone.
        key_column: Column of sample keys (letters, digits, - and _); by default rows are numbered.
        split_column: Column with train, val or test; by default the hash of the image decides, 80, 10 and 10 %.
        delimiter: Character between fields.
        encoding: Encoding of the table, such as cp1252 for tables from Windows.
        quotes: Whether fields may be quoted; null reads them so, and refuses a table where that seems to swallow rows.
        image_format: Images of this format are kept byte for byte, others are encoded anew.
        max_side: Largest longer side of an image, in pixels; larger ones are scaled. null keeps the size.
        samples_per_shard: Samples per tar file.
        vocab_size: Largest number of token ids, at least 260.
        max_bad: Largest number of bad rows to leave out; with more, nothing is converted.
        jobs: Processes; by default one per processor. The set's bytes do not depend on them.
        force: Replace a set that was converted differently.

    """
    from lightning_moevlm.data.write.convert.sources.csv_format import CsvFormat
    from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, CsvSource

    stated, form = (licence, licence_url, attribution), (image_format, max_side)
    given = _collect(stated, form, (samples_per_shard, vocab_size), max_bad, jobs, force)
    columns = Columns(image_column, caption_column, key_column, split_column)
    # a shell hands a tab on as \\t
    written = CsvFormat("\t" if delimiter == "\\t" else delimiter, encoding, quotes)
    source = CsvSource(local_source(table, "table"), _folder(images), name, columns, written)
    _convert(source, _target(out, source.name), given)


def convert_jsonl(
    table: str,
    images: str | None = None,
    out: str | None = None,
    licence: str | None = None,
    licence_url: str = "",
    attribution: str = "",
    name: str | None = None,
    image_field: str | None = "image",
    caption_field: str | None = "caption",
    key_field: str | None = None,
    split_field: str | None = None,
    image_format: ImageFormat = "jpg",
    max_side: int | None = None,
    samples_per_shard: int = 1000,
    vocab_size: int = 8192,
    max_bad: int = 0,
    jobs: int | None = None,
    force: bool = False,
) -> None:
    """Convert a file of JSON objects, one per line, and the folder of images that it names.

    Args:
        table: The file, UTF-8. Fields without a meaning go to the json member.
        images: Folder that image paths are relative to; by default the table's own. Paths may not leave it.
        out: Folder of the set; by default data/shards/NAME.
        licence: Licence of the data, such as "CC BY 4.0". Required.
        licence_url: Address of the licence text.
        attribution: Attribution that the licence requires.
        name: Name of the set and prefix of its keys; by default the table's name.
        image_field: Field of image paths; null for a set of texts alone.
        caption_field: Field of captions; null for a set of images alone.
        key_field: Field of sample keys (letters, digits, - and _); by default lines are numbered.
        split_field: Field with train, val or test; by default the hash of the image decides, 80, 10 and 10 %.
        image_format: Images of this format are kept byte for byte, others are encoded anew.
        max_side: Largest longer side of an image, in pixels; larger ones are scaled. null keeps the size.
        samples_per_shard: Samples per tar file.
        vocab_size: Largest number of token ids, at least 260.
        max_bad: Largest number of bad lines to leave out; with more, nothing is converted.
        jobs: Processes; by default one per processor. The set's bytes do not depend on them.
        force: Replace a set that was converted differently.

    """
    from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, JsonlSource

    stated, form = (licence, licence_url, attribution), (image_format, max_side)
    given = _collect(stated, form, (samples_per_shard, vocab_size), max_bad, jobs, force)
    columns = Columns(image_field, caption_field, key_field, split_field)
    source = JsonlSource(local_source(table, "table"), _folder(images), name, columns)
    _convert(source, _target(out, source.name), given)


def convert_coco_captions(
    annotations: str,
    images: str | None = None,
    out: str | None = None,
    licence: str | None = None,
    licence_url: str = "",
    attribution: str = "",
    name: str | None = None,
    captions: Literal["first", "each", "draw"] = "first",
    image_format: ImageFormat = "jpg",
    max_side: int | None = None,
    samples_per_shard: int = 1000,
    vocab_size: int = 8192,
    max_bad: int = 0,
    jobs: int | None = None,
    force: bool = False,
) -> None:
    """Convert a COCO captions file (captions_train2017.json and the like) and its folder of images.

    Args:
        annotations: The captions file.
        images: Folder of the images; by default the file's own.
        out: Folder of the set; by default data/shards/NAME.
        licence: Licence of the data, such as "CC BY 4.0". Required.
        licence_url: Address of the licence text.
        attribution: Attribution that the licence requires.
        name: Name of the set and prefix of its keys; by default the file's name.
        captions: first makes one sample per image, each one per caption; draw is one per image as well, and each
            epoch draws one of its captions. All captions are in the json member.
        image_format: Images of this format are kept byte for byte, others are encoded anew.
        max_side: Largest longer side of an image, in pixels; larger ones are scaled. null keeps the size.
        samples_per_shard: Samples per tar file.
        vocab_size: Largest number of token ids, at least 260.
        max_bad: Largest number of bad entries to leave out; with more, nothing is converted.
        jobs: Processes; by default one per processor. The set's bytes do not depend on them.
        force: Replace a set that was converted differently.

    """
    from lightning_moevlm.data.write.convert.sources.coco import CocoCaptions

    stated, form = (licence, licence_url, attribution), (image_format, max_side)
    given = _collect(stated, form, (samples_per_shard, vocab_size), max_bad, jobs, force)
    file = local_source(annotations, "annotations")
    source = CocoCaptions(file, _folder(images) or file.parent, name, captions)
    _convert(source, _target(out, source.name), given)


def convert_coco_vqa(
    questions: str,
    annotations: str,
    images: str | None = None,
    out: str | None = None,
    licence: str | None = None,
    licence_url: str = "",
    attribution: str = "",
    name: str | None = None,
    image_name: str | None = None,
    captions: str | None = None,
    image_format: ImageFormat = "jpg",
    max_side: int | None = None,
    samples_per_shard: int = 1000,
    vocab_size: int = 8192,
    max_bad: int = 0,
    jobs: int | None = None,
    force: bool = False,
) -> None:
    """Convert questions and answers in COCO's style (VQA v1, v2): one sample per image, questions in its json.

    Args:
        questions: The questions file.
        annotations: The file with the answers.
        images: Folder of the images; by default the questions' own.
        out: Folder of the set; by default data/shards/NAME.
        licence: Licence of the data, such as "CC BY 4.0". Required.
        licence_url: Address of the licence text.
        attribution: Attribution that the licence requires.
        name: Name of the set and prefix of its keys; by default the questions file's name.
        image_name: Pattern of image names; by default COCO_SUBTYPE_{image_id:012d}.jpg.
        captions: A COCO captions file of the same images, for captions as well and for the images' names.
        image_format: Images of this format are kept byte for byte, others are encoded anew.
        max_side: Largest longer side of an image, in pixels; larger ones are scaled. null keeps the size.
        samples_per_shard: Samples per tar file.
        vocab_size: Largest number of token ids, at least 260.
        max_bad: Largest number of bad entries to leave out; with more, nothing is converted.
        jobs: Processes; by default one per processor. The set's bytes do not depend on them.
        force: Replace a set that was converted differently.

    """
    from lightning_moevlm.data.write.convert.sources.coco import CocoQuestions

    stated, form = (licence, licence_url, attribution), (image_format, max_side)
    given = _collect(stated, form, (samples_per_shard, vocab_size), max_bad, jobs, force)
    asked, answered = local_source(questions, "questions"), local_source(annotations, "annotations")
    described = None if captions is None else local_source(captions, "--captions")
    source = CocoQuestions(asked, answered, _folder(images) or asked.parent, name, image_name, described)
    _convert(source, _target(out, source.name), given)


def convert_img2dataset(
    folder: str,
    out: str | None = None,
    licence: str | None = None,
    licence_url: str = "",
    attribution: str = "",
    name: str | None = None,
    keep_tars: bool = True,
    recompress: bool = False,
    image_member: str | None = None,
    caption_member: str | None = "txt",
    caption_field: str | None = None,
    image_format: ImageFormat = "jpg",
    max_side: int | None = None,
    samples_per_shard: int = 1000,
    vocab_size: int = 8192,
    max_bad: int = 0,
    jobs: int | None = None,
    force: bool = False,
) -> None:
    """Make a set from img2dataset's downloads (--output_format webdataset) or any WebDataset tars.

    The tars stay as they are: they are linked into the set, or, where --out is their own folder, get a manifest beside
    them. Whole tars then fall into the splits. Bad samples stay in their tars, and data.max_lost_fraction must bear
    them; --keep_tars false writes the good samples anew, mixed and split by image.

    Args:
        folder: The folder with 00000.tar, 00000_stats.json and so on; without any statistics, with tars of any name.
        out: Folder of the set; by default data/shards/NAME.
        licence: Licence of the data, such as "CC BY 4.0". Required.
        licence_url: Address of the licence text.
        attribution: Attribution that the licence requires.
        name: Name of the set; by default the folder's name.
        keep_tars: Whether the tars stay as they are.
        recompress: Whether compressed tars (gzip, bzip2, xz) are unpacked into the set; they are refused otherwise.
        image_member: Extension of the images, as input.jpg for KEY.input.jpg; null takes jpg, png and webp.
        caption_member: Extension of the captions; null for a set of images alone.
        caption_field: Field of KEY.json that holds the caption, or a list of them, of which each epoch draws one.
        image_format: Format of samples that are written anew.
        max_side: Largest longer side of samples that are written anew, in pixels; null keeps the size.
        samples_per_shard: Samples per tar file that is written anew.
        vocab_size: Largest number of token ids, at least 260.
        max_bad: Largest number of bad samples to tolerate.
        jobs: Processes; by default one per processor. The set's bytes do not depend on them.
        force: Replace a set that was converted differently.

    """
    from lightning_moevlm.common.atomic_files import explain_write_errors
    from lightning_moevlm.data.write.convert.keep_tars import keep_tars as convert_kept
    from lightning_moevlm.data.write.convert.sources.img2dataset import Img2datasetSource
    from lightning_moevlm.data.write.convert.sources.member_names import MemberNames
    from lightning_moevlm.data.write.convert.sources.row_source import make_set_name, require_folder
    from lightning_moevlm.data.write.convert.sources.unpack import refuse_compressed, unpack_tars

    stated, form = (licence, licence_url, attribution), (image_format, max_side)
    given = _collect(stated, form, (samples_per_shard, vocab_size), max_bad, jobs, force)
    names = MemberNames(image_member, caption_member, caption_field)
    if keep_tars and (image_format, max_side, samples_per_shard) != ("jpg", None, 1000):
        raise UserError(
            "image_format, max_side and samples_per_shard are for samples that are written anew; add --keep_tars "
            "false, or leave them out"
        )
    tars = require_folder(local_source(folder, "folder"), "folder")
    name = make_set_name(name or tars.resolve().name)
    target = _target(out, name)
    if not recompress:
        refuse_compressed(tars)
    with explain_write_errors(target, _AGAIN), unpack_tars(tars, target) if recompress else nullcontext(tars) as plain:
        if keep_tars:
            run = partial(convert_kept, plain, name, target, given.licence, vocab_size, given.options, names)
            _tell(target, run, _STAY)
        else:
            _convert(Img2datasetSource(plain, name, names), target, given)


COMMANDS: dict[str, Callable[..., None]] = {
    "csv": convert_csv,
    "jsonl": convert_jsonl,
    "coco_captions": convert_coco_captions,
    "coco_vqa": convert_coco_vqa,
    "img2dataset": convert_img2dataset,
}


def _folder(images: str | None) -> Path | None:
    return None if images is None else local_source(images, "--images")


def _target(out: str | None, name: str) -> Path:
    return local_target(f"data/shards/{name}" if out is None else out, "--out")


class _Given(NamedTuple):
    """The options that all kinds of sources share."""

    licence: "Licence"
    set_options: "SetOptions"
    options: "ConvertOptions"


def _collect(
    licence: tuple[str | None, str, str],
    images: tuple[ImageFormat, int | None],
    shards: tuple[int, int],
    max_bad: int,
    jobs: int | None,
    force: bool,
) -> _Given:
    from lightning_moevlm.data.write.convert.convert import ConvertOptions, SetOptions
    from lightning_moevlm.data.write.convert.finish_set import Licence
    from lightning_moevlm.data.write.convert.shard_image import ImageOptions

    options = ConvertOptions(max_bad, len(os.sched_getaffinity(0)) if jobs is None else jobs, force)
    return _Given(Licence(*licence), SetOptions(ImageOptions(*images), *shards), options)


def _convert(source: "Source", target: Path, given: _Given) -> None:
    from lightning_moevlm.data.write.convert.convert import convert

    _tell(target, lambda: convert(source, target, *given))


def _tell(out: Path, run: "Callable[[], Converted]", borne: str = "left out") -> None:
    """Convert, and say what came of it; bad rows are shown as a table, under `borne` where there are not too many."""
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
        _show(converted.left_out, borne)
    manifest = converted.manifest
    counts = {split: manifest.num_samples(split) for split in manifest.splits}
    print_built(str(out), "converted" if converted.built else None, manifest.digest, counts)
    if converted.built:
        num_bad = sum(count.num_rows for count in converted.left_out)
        said = f"{converted.num_rows:,} rows read, {converted.num_rows - num_bad:,} of them good, {num_bad:,} bad"
        for line in (said, *converted.notes):
            Console(soft_wrap=True, highlight=False).print(line, markup=False)


def _show(counts: "tuple[BadCount, ...]", title: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("cause", "rows", "the first of them", title=title, title_justify="left")
    for count in counts:
        table.add_row(count.cause, f"{count.num_rows:,}", Text(f"{count.first.place}: {count.first.message}"))
    terminal = Console(stderr=True)
    (terminal if terminal.is_terminal else Console(stderr=True, width=160)).print(table)
