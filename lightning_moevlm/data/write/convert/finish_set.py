"""What makes a folder of shards a set: tokenizer, licence and, last of all, the manifest."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.layout import PLAIN, Layout
from lightning_moevlm.data.format.manifest import Manifest, Scalar, ShardEntry, Split
from lightning_moevlm.data.text.tokenizer import train_tokenizer
from lightning_moevlm.data.write.build_set import canonical_json

MAX_LEARNT_TEXTS = 1_000_000
"""The tokenizer learns from so many training texts at most: more change little, and all of them are in memory."""


@dataclass(frozen=True)
class Terms:
    """Under which terms the pictures and texts stand: what the set's manifest and LICENCE.txt say."""

    licence: str | None
    licence_url: str
    attribution: str

    @property
    def named(self) -> str:
        """The licence.

        Raises:
            UserError: if there is none.

        """
        if not self.licence or not self.licence.strip():
            raise UserError("--licence is missing: say under which one the data stands, as in --licence 'CC BY 4.0'")
        return self.licence.strip()

    def as_arguments(self) -> dict[str, Scalar]:
        """Return them as a part of the set's recipe: under other terms it is another set."""
        return {"licence": self.named, "licence_url": self.licence_url, "attribution": self.attribution}


class ConvertRecipe(NamedTuple):
    """Tells whether a set is the one asked for (`build.Recipe`)."""

    name: str
    version: int
    build: dict[str, Scalar]

    @property
    def fingerprint(self) -> str:
        """Sha256, in hex, of everything that decides about the set."""
        return hashlib.sha256(canonical_json(self).encode()).hexdigest()


class Contents(NamedTuple):
    """What the shards hold. image_size: pixels (`Manifest.image_size`). texts: of the training split, in order."""

    image_size: int
    members: tuple[str, ...]
    texts: Iterable[str]
    splits: dict[Split, tuple[ShardEntry, ...]]
    layout: Layout = PLAIN


def finish(folder: Path, recipe: ConvertRecipe, terms: Terms, contents: Contents, vocab_size: int) -> Manifest:
    """Write `tokenizer.json`, `LICENCE.txt` and `manifest.json` into a folder of shards.

    Raises:
        UserError: if `vocab_size` is too small.

    """
    manifest = Manifest(
        name=recipe.name,
        version=recipe.version,
        licence=terms.named,
        licence_url=terms.licence_url,
        attribution=terms.attribution,
        image_size=contents.image_size,
        members=contents.members,
        build=recipe.build,
        sources={name: version(name) for name in ("pillow", "simplejpeg", "tokenizers")},
        tokenizer=train_tokenizer(islice(contents.texts, MAX_LEARNT_TEXTS), vocab_size, folder),
        splits=contents.splits,
        layout=contents.layout,
    )
    said = "\n".join(line for line in (terms.attribution, terms.named, terms.licence_url) if line)
    (folder / "LICENCE.txt").write_text(said + "\n", encoding="utf-8")
    manifest.write(folder)
    return manifest


def refuse_empty(num_samples: Mapping[Split, int]) -> None:
    """Go on only if every split has a sample.

    Raises:
        UserError: if one has none.

    """
    for split, num in num_samples.items():
        if not num:
            raise UserError(
                f"{sum(num_samples.values())} samples leave the {split} split empty; give more of them, or say which "
                "split each belongs to (--split_column of a table)"
            )


def usual_size(sides: Mapping[int, int]) -> int:
    """Return a square size for the set: the largest multiple of 32 that half of the shorter sides reach.

    sides: how many pictures have which.

    It is what pictures are scaled to where nobody says otherwise (codebooks, contact sheets). Sets of smaller pictures
    get a multiple of 8, sets without pictures 0.
    """
    if not sides:
        return 0
    before_middle = (sum(sides.values()) - 1) // 2
    larger = accumulate(sides[side] for side in sorted(sides, reverse=True))
    middle = next(side for side, num in zip(sorted(sides, reverse=True), larger, strict=True) if num > before_middle)
    step = 32 if middle >= 32 else 8
    return max(8, middle // step * step)
