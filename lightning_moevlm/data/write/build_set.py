"""Building a set of shards: whole, once, or not at all.

A set is built in a folder beside its target and moved there when it is complete, so a killed build leaves
no half set behind. Building again with the same arguments does nothing; with others it is refused unless
forced.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.progress import track
from lightning_moevlm.data.format.manifest import MANIFEST_FILE, Manifest, Scalar, check_shard_size, read_manifest
from lightning_moevlm.data.storage.local import local_target
from lightning_moevlm.data.text.tokenizer import train_tokenizer
from lightning_moevlm.data.write.shard_writer import Sample, ShardWriter


@dataclass(frozen=True)
class SetPlan:
    """What is to be built.

    name: of the set. version: of the recipe, raised whenever the same arguments give other samples.
    arguments: the recipe's arguments, compared with an existing set's. num_samples: for the progress bar.
    """

    name: str
    version: int
    licence: str
    licence_url: str
    attribution: str
    image_size: int
    image_format: str
    arguments: dict[str, Scalar]
    sources: dict[str, str]
    num_samples: int
    samples_per_shard: int
    vocab_size: int

    @property
    def build(self) -> dict[str, Scalar]:
        """All arguments that decide about the set's bytes."""
        return {
            **self.arguments,
            "image_size": self.image_size,
            "image_format": self.image_format,
            "samples_per_shard": self.samples_per_shard,
            "vocab_size": self.vocab_size,
        }


class Recipe(Protocol):
    """What tells whether a set is the one asked for: its name, the version of its recipe, all its arguments."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def version(self) -> int: ...  # noqa: D102

    @property
    def build(self) -> dict[str, Scalar]: ...  # noqa: D102


def find_existing_set(out: Path, plan: Recipe, force: bool) -> Manifest | None:
    """Return the manifest if `out` already holds just this set; None if it is to be built.

    Raises:
        UserError: if `out` holds another set and `force` is off, or holds something that is no set at all.

    """
    local_target(str(out), "--out")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / MANIFEST_FILE).is_file():
        raise UserError(f"--out {out} is not empty and holds no set of shards; give another folder")
    if force:
        return None
    manifest = read_manifest(out)
    wanted = (plan.name, plan.version, plan.build)
    found = (manifest.name, manifest.version, manifest.build)
    if wanted != found:
        raise UserError(
            f"{out} holds a set that was built differently ({_difference(manifest, plan)}); "
            "pass --force true to replace it, or another --out"
        )
    for shards in manifest.splits.values():
        for shard in shards:
            check_shard_size(out, shard)
    return manifest


def _difference(manifest: Manifest, plan: Recipe) -> str:
    pairs: list[tuple[str, object, object]] = [
        ("set", manifest.name, plan.name),
        ("recipe version", manifest.version, plan.version),
        *((key, manifest.build.get(key), plan.build.get(key)) for key in sorted({*manifest.build, *plan.build})),
    ]
    return ", ".join(f"{key} {there} there, {here} asked" for key, there, here in pairs if there != here)


def build_set(out: Path, plan: SetPlan, samples: Iterable[Sample]) -> Manifest:
    """Write all shards, the tokenizer and the manifest, and put them in place of `out` at the very end.

    Raises:
        UserError: if a split stays empty, or `vocab_size` is too small.

    """
    if plan.samples_per_shard < 1:
        raise UserError(f"samples_per_shard is {plan.samples_per_shard}, but a shard needs at least 1")
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
            raise UserError(f"{plan.num_samples} samples leave the {split} split empty; ask for more samples")
    manifest = Manifest(
        name=plan.name,
        version=plan.version,
        licence=plan.licence,
        licence_url=plan.licence_url,
        attribution=plan.attribution,
        image_size=plan.image_size,
        members=tuple(sorted(("json", "txt", plan.image_format))),
        build=plan.build,
        sources=plan.sources,
        tokenizer=train_tokenizer(captions, plan.vocab_size, root),
        splits=writer.entries,
    )
    (root / "LICENCE.txt").write_text(f"{plan.attribution}\n{plan.licence_url}\n", encoding="utf-8")
    manifest.write(root)
    return manifest


def put_in_place(building: Path, out: Path) -> None:
    """Rename the finished folder to `out`; an older set is moved aside first and removed last."""
    if not out.exists():
        building.replace(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.replaced-", dir=out.parent))
    out.replace(aside)
    try:
        building.replace(out)
    except OSError:
        aside.replace(out)  # the older set goes back: better that than none
        raise
    shutil.rmtree(aside)


def canonical_json(content: object) -> str:
    """One-line JSON with sorted keys, so that equal content is equal bytes."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
