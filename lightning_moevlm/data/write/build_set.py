"""Builds a set of shards: whole, once, or not at all.

A set is built in a folder beside its target, and moved there when it is complete, so a killed build leaves no partial
set. Building again with the same arguments does nothing. With other arguments it is refused unless forced.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.common.progress import track
from lightning_moevlm.data.format.manifest import MANIFEST_FILE, Manifest, Scalar, check_shard_size, read_manifest
from lightning_moevlm.data.storage.local import local_target
from lightning_moevlm.data.text.tokenizer import train_tokenizer
from lightning_moevlm.data.write.shard_writer import Sample, ShardWriter


class Recipe(NamedTuple):
    """Identifies a set."""

    name: str
    version: int
    build: dict[str, Scalar]  # all arguments that determine its bytes

    @property
    def fingerprint(self) -> str:
        """Sha256, in hex, of the recipe."""
        return hashlib.sha256(canonical_json(self).encode()).hexdigest()


@dataclass(frozen=True)
class SetPlan:
    """A set to build."""

    name: str
    version: int  # of the recipe, raised when the same arguments give other samples
    licence: str
    licence_url: str
    attribution: str
    image_size: int  # pixels per side
    image_format: str
    arguments: dict[str, Scalar]  # of the recipe, compared with those of an existing set
    sources: dict[str, str]  # versions of the packages that the images come from
    num_samples: int  # for the progress bar
    samples_per_shard: int
    vocab_size: int

    @property
    def recipe(self) -> Recipe:
        """The recipe of the set."""
        build = {
            **self.arguments,
            "image_size": self.image_size,
            "image_format": self.image_format,
            "samples_per_shard": self.samples_per_shard,
            "vocab_size": self.vocab_size,
        }
        return Recipe(self.name, self.version, build)


def find_existing_set(out: Path, recipe: Recipe, force: bool) -> Manifest | None:
    """Return the manifest if `out` already holds exactly this set; None if it must be built.

    Raises:
        UserError: if `out` holds something else than a set, or another set and `force` is off.
    """
    local_target(str(out))
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / MANIFEST_FILE).is_file():
        raise UserError(f"--out {out} is not empty and is not a set of shards; give another folder")
    if force:
        return None
    manifest = read_manifest(out)
    if recipe != (manifest.name, manifest.version, manifest.build):
        raise UserError(
            f"{out} holds a set that was built differently ({_difference(manifest, recipe)}); "
            "pass --force true to replace it, or another --out"
        )
    for shards in manifest.splits.values():
        for shard in shards if not manifest.shards_at else ():
            check_shard_size(out, shard)
    return manifest


def _difference(manifest: Manifest, recipe: Recipe) -> str:
    pairs: list[tuple[str, object, object]] = [
        ("set", manifest.name, recipe.name),
        ("recipe version", manifest.version, recipe.version),
        *((key, manifest.build.get(key), recipe.build.get(key)) for key in sorted({*manifest.build, *recipe.build})),
    ]
    return ", ".join(f"{key} {there} there, {here} asked" for key, there, here in pairs if there != here)


def build_set(out: Path, plan: SetPlan, samples: Iterable[Sample]) -> Manifest:
    """Write all shards, the tokenizer and the manifest, and move them to `out` at the end.

    Raises:
        UserError: if a split stays empty, or `vocab_size` is too small.
    """
    check_number("samples_per_shard", plan.samples_per_shard, least=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.building-", dir=out.parent))
    try:
        manifest = _fill(building, plan, samples)
        building.chmod(0o755)
        put_in_place(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return manifest


def _fill(root: Path, plan: SetPlan, samples: Iterable[Sample]) -> Manifest:
    captions: list[str] = []
    with ShardWriter(root, plan.samples_per_shard) as writer:
        for sample in track(samples, plan.num_samples, f"building {plan.name}"):
            if writer.write(sample) == "train":
                captions.append(sample.caption)
    for split, shards in writer.entries.items():
        if not shards:
            raise UserError(f"num_samples {plan.num_samples} leaves the {split} split empty: raise it")
    manifest = Manifest(
        name=plan.name,
        version=plan.version,
        licence=plan.licence,
        licence_url=plan.licence_url,
        attribution=plan.attribution,
        image_size=plan.image_size,
        members=tuple(sorted(("json", "txt", plan.image_format))),
        build=plan.recipe.build,
        sources=plan.sources,
        tokenizer=train_tokenizer(captions, plan.vocab_size, root),
        splits=writer.entries,
    )
    (root / "LICENCE.txt").write_text(f"{plan.attribution}\n{plan.licence_url}\n", encoding="utf-8")
    manifest.write(root)
    return manifest


def put_in_place(building: Path, out: Path) -> None:
    """Move the finished folder to `out`; an older set is moved aside first and deleted last."""
    if not out.exists():
        building.replace(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.replaced-", dir=out.parent))
    out.replace(aside)
    try:
        building.replace(out)
    except OSError:
        aside.replace(out)  # restore the older set
        raise
    shutil.rmtree(aside)


def canonical_json(content: object) -> str:
    """Return one-line JSON with sorted keys, so that equal content has equal bytes."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
