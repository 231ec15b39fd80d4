"""A contact sheet: the first samples of a split, pictures with their captions, on one PNG to look at."""

import textwrap
from collections.abc import Iterator
from importlib.resources import as_file, files
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lightning_moevlm.data.format.manifest import Manifest, Split
from lightning_moevlm.data.format.shard_reader import RawSample, all_or_error, read_shard
from lightning_moevlm.data.images.decode import undecodable
from lightning_moevlm.data.inspect.thumbnails import picture_extension, thumbnail
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.captions import captions_in

TILE = 160
MARGIN = 12
LINE = 14
LINES = 5
COLUMNS = 6
LETTERS = 26  # in a line below a tile
TEXT_LINES = 14  # in a tile that holds a text


def write_contact_sheet(storage: ShardStorage, manifest: Manifest, split: Split, num_samples: int, path: Path) -> None:
    """Draw the first samples of a split and write the PNG; in a set of texts, tiles hold the texts.

    Raises:
        UserError: if a shard or a picture on the way is not in order.

    """
    samples = list(islice(_samples(storage, manifest, split), num_samples))
    extension = picture_extension(manifest)
    rows = -(-len(samples) // COLUMNS)
    captions = captions_in(manifest.members, manifest.layout.caption_field)
    has_lines = extension is not None and captions is not None
    width, height = TILE + MARGIN, TILE + (LINES * LINE if has_lines else 0) + MARGIN
    sheet = Image.new("RGB", (COLUMNS * width + MARGIN, rows * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), _font()
    for place, sample in enumerate(samples):
        left, top = MARGIN + place % COLUMNS * width, MARGIN + place // COLUMNS * height
        caption = "" if captions is None else next(iter(captions.of(sample.members[captions.member])), "")
        if extension is None:
            draw.multiline_text((left + 4, top + 4), _lines(caption, TEXT_LINES - 3), "black", font, spacing=2)
        else:
            tile = _tile(sample, extension)
            sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
            if has_lines:
                draw.multiline_text((left, top + TILE + 3), _lines(caption, LINES), "black", font, spacing=1)
        draw.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline="#808080")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    sheet.save(unfinished, "png")
    unfinished.replace(path)


def _samples(storage: ShardStorage, manifest: Manifest, split: Split) -> Iterator[RawSample]:
    for shard in manifest.splits[split]:
        yield from all_or_error(read_shard(storage, shard, frozenset(manifest.members), manifest.layout))


def _font() -> ImageFont.FreeTypeFont:
    # Pillow's own font knows Latin letters only; the one that matplotlib brings knows many more
    with as_file(files("matplotlib") / "mpl-data/fonts/ttf/DejaVuSans.ttf") as path:
        return ImageFont.truetype(str(path), size=11)


def _lines(caption: str, num_lines: int) -> str:
    return "\n".join(textwrap.wrap(caption, width=LETTERS, max_lines=num_lines, placeholder=" ..."))


def _tile(sample: RawSample, extension: str) -> Image.Image:
    """Return the whole picture; small ones are enlarged, so that they can be seen."""
    try:
        picture = thumbnail(sample.members[extension], extension, TILE)
    except ValueError as error:
        raise undecodable(sample.key, sample.shard, extension, error) from error
    scale = TILE / max(picture.size)
    if scale == 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)
