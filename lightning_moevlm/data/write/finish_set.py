"""Turns a folder of shards into a set: writes the tokenizer, the licence and, last of all, the manifest."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.layout import PLAIN_LAYOUT, Layout
from lightning_moevlm.data.format.manifest import Manifest, Scalar, ShardEntry, Split
from lightning_moevlm.data.text.tokenizer import copy_tokenizer, train_tokenizer
from lightning_moevlm.data.write.set_folder import Recipe

MAX_LEARNT_TEXTS = 1_000_000
"""Training texts of the tokenizer at most: more change little, and all of them are in memory."""


@dataclass(frozen=True)
class Licence:
    """The licence of images and texts, for the manifest and LICENCE.txt. A missing name raises a `UserError`."""

    name: str | None  # such as "CC BY 4.0"
    url: str  # address of its text, or ""
    attribution: str  # sentence that it requires, or ""

    def __post_init__(self) -> None:
        if not self.text:
            raise UserError("--licence is missing: name the licence of the data, as in --licence 'CC BY 4.0'")

    @property
    def text(self) -> str:
        """The name without surrounding blanks."""
        return (self.name or "").strip()

    def as_arguments(self) -> dict[str, Scalar]:
        """Return the licence as a part of the set's recipe."""
        return {"licence": self.text, "licence_url": self.url, "attribution": self.attribution}


class Contents(NamedTuple):
    """The content of the shards."""

    image_size: int  # pixels (`Manifest.image_size`)
    members: tuple[str, ...]
    texts: Iterable[str]  # of the training split, in order
    splits: dict[Split, tuple[ShardEntry, ...]]
    layout: Layout = PLAIN_LAYOUT
    tokenizer_file: Path | None = None  # of another set, to share its ids; None trains one on the texts
    shards_at: str = ""  # place of the tars, if they are not beside the manifest
    packages: Sequence[str] = ("pillow", "simplejpeg", "tokenizers")  # whose versions the bytes depend on


def finish_set(folder: Path, recipe: Recipe, licence: Licence, contents: Contents, vocab_size: int) -> Manifest:
    """Write `tokenizer.json`, `LICENCE.txt` and `manifest.json` into a folder of shards.

    Raises:
        UserError: if `vocab_size` is too small.
    """
    manifest = Manifest(
        name=recipe.name,
        version=recipe.version,
        licence=licence.text,
        licence_url=licence.url,
        attribution=licence.attribution,
        image_size=contents.image_size,
        members=contents.members,
        build=recipe.build,
        sources={name: version(name) for name in contents.packages},
        tokenizer=(
            train_tokenizer(islice(contents.texts, MAX_LEARNT_TEXTS), vocab_size, folder)
            if contents.tokenizer_file is None
            else copy_tokenizer(contents.tokenizer_file, folder)
        ),
        splits={
            split: tuple(replace(entry, at=contents.shards_at) for entry in entries)
            for split, entries in contents.splits.items()
        },
        layout=contents.layout,
        shards_at=contents.shards_at,
    )
    said = "\n".join(line for line in (licence.attribution, licence.text, licence.url) if line)
    (folder / "LICENCE.txt").write_text(said + "\n", encoding="utf-8")
    manifest.write(folder)
    return manifest


def refuse_empty(num_samples: Mapping[Split, int]) -> None:
    """Refuse a set with an empty split.

    Raises:
        UserError: with the empty split.
    """
    for split, num in num_samples.items():
        if not num:
            raise UserError(
                f"{sum(num_samples.values())} samples leave the {split} split empty; give more samples, or name their "
                "splits (--split_column of a table)"
            )


def typical_size(sides: Mapping[int, int]) -> int:
    """Return the default size of the set's images: the largest multiple of 32 that half of the shorter sides reach.

    Codebooks use it. Sets of smaller images get a multiple of 8, sets without images 0.

    sides: number of images by shorter side, pixels.
    """
    if not sides:
        return 0
    before_middle = (sum(sides.values()) - 1) // 2
    larger = accumulate(sides[side] for side in sorted(sides, reverse=True))
    middle = next(side for side, num in zip(sorted(sides, reverse=True), larger, strict=True) if num > before_middle)
    step = 32 if middle >= 32 else 8
    return max(8, middle // step * step)
