"""A contact sheet: the first pictures of a split with their captions, on one PNG to look at."""

import textwrap
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lightning_moevlm.errors import UserError
from lightning_moevlm.shards.decode import (
    CAPTION_EXTENSION,
    IMAGE_EXTENSIONS,
    decode_caption,
    decode_image,
)
from lightning_moevlm.shards.manifest import Manifest, Split
from lightning_moevlm.shards.source import RawSample, all_or_error, read_shard
from lightning_moevlm.shards.storage import ShardStorage

TILE = 160
MARGIN = 12
LINE = 14
LINES = 5
COLUMNS = 6


def write_contact_sheet(root: Path, manifest: Manifest, split: Split, num_samples: int, path: Path) -> None:
    """Draw the first samples of a split's first shard, with captions, and write the PNG.

    Raises:
        UserError: if the set has no pictures, or the shard is not in order.

    """
    extension = next((e for e in IMAGE_EXTENSIONS if e in manifest.members), None)
    if extension is None:
        raise UserError(f"{root} holds no pictures, so there is nothing to put on a contact sheet")
    shard = read_shard(ShardStorage(str(root)), manifest.splits[split][0], frozenset(manifest.members))
    samples = list(islice(all_or_error(shard), num_samples))
    rows = -(-len(samples) // COLUMNS)
    width, height = TILE + MARGIN, TILE + LINES * LINE + MARGIN
    sheet = Image.new("RGB", (COLUMNS * width + MARGIN, rows * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for place, sample in enumerate(samples):
        left, top = MARGIN + place % COLUMNS * width, MARGIN + place // COLUMNS * height
        sheet.paste(_tile(sample, extension, manifest.image_size), (left, top))
        draw.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline="#808080")
        caption = decode_caption(sample.members.get(CAPTION_EXTENSION, b""))
        lines = textwrap.wrap(caption, width=26, max_lines=LINES)
        draw.multiline_text((left, top + TILE + 3), "\n".join(lines), fill="black", font=font, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    sheet.save(unfinished, "png")
    unfinished.replace(path)


def _tile(sample: RawSample, extension: str, image_size: int) -> Image.Image:
    image_RYX = decode_image(sample.members[extension], extension, image_size)
    picture = Image.fromarray(image_RYX.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((TILE, TILE), Image.Resampling.LANCZOS)
