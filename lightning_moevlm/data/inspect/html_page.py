"""Writes samples of a set as one HTML page: images, captions with their tokens, questions, annotations.

The page is one file without scripts that opens anywhere. Content of the data is always shown as text, never run.
"""

import base64
import io
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lightning_moevlm.common.atomic_files import write_atomically
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.common.progress import track
from lightning_moevlm.data.format.faults import Lost
from lightning_moevlm.data.format.manifest import Manifest, Split
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard
from lightning_moevlm.data.images.decode import image_kind
from lightning_moevlm.data.images.open_image import format_of, open_image
from lightning_moevlm.data.images.orientation import UPRIGHT, orientation
from lightning_moevlm.data.inspect.thumbnails import (
    FORMATS,
    modality_of,
    read_image_size,
    thumbnail,
)
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.captions import CAPTION_EXTENSION, find_captions
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer

SHOWN_SIDE = 320
"""Pixels; larger and rotated images are encoded anew, others are embedded unchanged."""
_TEMPLATES = Path(__file__).parent / "templates"
_LOSSES_SHOWN = 10
_FLAT_LIST = re.compile(r"\[(\n[^\[\]{}]*)\]")
_LONG_TEXT = 2000  # characters of a caption that are shown and tokenised


class ShownImage(NamedTuple):
    """An image in the page."""

    data_uri: str
    size: str  # as stored: "640 x 480 px, 83.1 kB"


class ShownText(NamedTuple):
    """A caption in the page."""

    text: str
    tokens: tuple[str, ...]


class ShownSample(NamedTuple):
    """A sample in the page."""

    key: str
    shard: str
    images: tuple[ShownImage, ...]  # two of a sample about two images
    captions: tuple[ShownText, ...]
    questions: tuple[dict[str, str], ...]
    annotation: str  # indented JSON; "" without a json member
    faults: tuple[str, ...]  # reasons why parts cannot be shown


class Page(NamedTuple):
    """The content of the page."""

    manifest: Manifest
    split: Split
    modality: str  # pairs, images or texts
    num_in_split: int
    containing: str | None
    samples: tuple[ShownSample, ...]
    lost: tuple[str, ...]  # messages of samples that cannot be read
    title: str = ""  # in place of the set and the split


def write_page(storage: ShardStorage, split: Split, num_samples: int, containing: str | None, path: Path) -> Page:
    """Write the first samples of a split to an HTML file.

    containing: Only samples whose key, caption or json member contains this text, in upper or lower case.

    Raises:
        UserError: if the set's manifest or tokenizer is invalid, or no sample matches. The page shows faults of samples
            and shards.
    """
    check_number("num_samples", num_samples, least=1)
    manifest = storage.read_manifest()
    tokenizer = storage.read_tokenizer(manifest.tokenizer)
    lost: list[Lost] = []
    chosen = list(islice(_choose(storage, manifest, split, containing, lost), num_samples))
    if not chosen and not lost:
        raise UserError(
            f"no sample of the {split} split of {storage} contains {containing!r}; try another --containing or --split"
        )
    samples = tuple(
        _show_sample(sample, manifest, tokenizer) for sample in track(chosen, len(chosen), "showing samples")
    )
    page = Page(
        manifest, split, modality_of(manifest), manifest.num_samples(split), containing, samples, _describe_losses(lost)
    )
    write_atomically(path, _render(page))
    return page


def write_page_of(storage: ShardStorage, keys: Sequence[str], title: str, path: Path) -> Page:
    """Write the training samples with these keys to an HTML file, in the order of the keys.

    Raises:
        UserError: if the set's manifest or tokenizer is invalid, or it has none of the samples.
    """
    manifest = storage.read_manifest()
    tokenizer = storage.read_tokenizer(manifest.tokenizer)
    place = {key: number for number, key in enumerate(keys)}
    lost: list[Lost] = []
    found: dict[str, RawSample] = {}
    for sample in _choose(storage, manifest, "train", None, lost):
        if sample.key in place:
            found[sample.key] = sample
            if len(found) == len(place):
                break
    if not found:
        raise UserError(f"the training split of {storage} has none of the samples, such as {keys[0]}")
    chosen = [found[key] for key in place if key in found]
    samples = tuple(_show_sample(sample, manifest, tokenizer) for sample in chosen)
    number = manifest.num_samples("train")
    page = Page(manifest, "train", modality_of(manifest), number, None, samples, _describe_losses(lost), title)
    write_atomically(path, _render(page))
    return page


def _choose(
    storage: ShardStorage, manifest: Manifest, split: Split, containing: str | None, lost: list[Lost]
) -> Iterator[RawSample]:
    wanted = None if containing is None else containing.casefold()
    for shard in manifest.splits[split]:
        for sample in read_shard(storage, shard, frozenset(manifest.members), manifest.layout):
            if isinstance(sample, Lost):
                lost.append(sample)
            elif wanted is None or wanted in _search_text(sample):
                yield sample


def _describe_losses(lost: list[Lost]) -> tuple[str, ...]:
    messages = [f"{loss.cause}: {loss.message}" for loss in lost[:_LOSSES_SHOWN]]
    if len(lost) > _LOSSES_SHOWN:
        messages.append(f"and {len(lost) - _LOSSES_SHOWN:,} more")
    return tuple(messages)


def _search_text(sample: RawSample) -> str:
    texts = [data for extension, data in sample.members.items() if extension in (CAPTION_EXTENSION, "json")]
    return "\n".join([sample.key, *(data.decode("utf-8", "replace") for data in texts)]).casefold()


def _show_sample(sample: RawSample, manifest: Manifest, tokenizer: CaptionTokenizer) -> ShownSample:
    faults: list[str] = []
    images: list[ShownImage] = []
    texts: tuple[str, ...] = ()
    annotation = None
    captions = find_captions(manifest.members, manifest.layout.caption_field)
    for member in manifest.members:
        if member not in sample.members:
            faults.append(f"there is no .{member} member")
            continue
        data = sample.members[member]
        try:
            if (kind := image_kind(member)) is not None:
                images.append(_show_image(data, kind))
            if captions is not None and member == captions.member:
                texts = tuple(text[:_LONG_TEXT] for text in captions.read(data))
            if member == "json":
                annotation = json.loads(data)
        except ValueError as error:
            faults.append(f".{member} cannot be decoded ({error})")
    return ShownSample(
        key=sample.key,
        shard=sample.shard,
        images=tuple(images),
        captions=tuple(ShownText(text, tuple(tokenizer.decode([i]) for i in tokenizer.ids(text))) for text in texts),
        questions=_questions(annotation),
        annotation="" if annotation is None else _indent(annotation),
        faults=tuple(faults),
    )


def _show_image(data: bytes, extension: str) -> ShownImage:
    width, height = read_image_size(data, extension)
    size = f"{width} x {height} px, {len(data) / 1e3:,.1f} kB"
    small = thumbnail(data, extension, SHOWN_SIDE)  # raises if it cannot be decoded
    with open_image(data, FORMATS[extension]) as image:
        mime = Image.MIME[format_of(image)]
    if max(width, height) > SHOWN_SIDE or orientation(data) != UPRIGHT:  # not every browser rotates PNGs
        out = io.BytesIO()
        small.save(out, "JPEG", quality=85)
        data, mime = out.getvalue(), "image/jpeg"
    return ShownImage(f"data:{mime};base64,{base64.b64encode(data).decode()}", size)


def _questions(annotation: object) -> tuple[dict[str, str], ...]:
    """Return the questions of an annotation, as in `scenes`: kind, question, answer."""
    found = annotation.get("questions") if isinstance(annotation, dict) else None
    if not isinstance(found, list):
        return ()
    parts = ("kind", "question", "answer")
    return tuple({part: str(entry.get(part, "")) for part in parts} for entry in found if isinstance(entry, dict))


def _indent(annotation: object) -> str:
    """Return indented JSON, with flat lists (mostly boxes) on one line."""
    text = json.dumps(annotation, indent=1, ensure_ascii=False)
    # JSON strings contain no line breaks, so only the indentation changes
    return _FLAT_LIST.sub(lambda found: "[" + re.sub(r"\n\s*", " ", found[1]).strip() + "]", text)


def _render(page: Page) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("samples.html.j2").render(page=page, manifest=page.manifest)
