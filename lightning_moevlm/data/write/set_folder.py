"""The folder of a set: whether it holds the set that is asked for, and how a finished set comes there.

A set is made in a folder beside its target, and moved there when it is complete, so a killed command leaves no partial
set. Making it again with the same arguments does nothing. With other arguments it is refused unless forced.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import MANIFEST_FILE, Manifest, Scalar, check_shard_size, read_manifest
from lightning_moevlm.data.storage.local import local_target


class Recipe(NamedTuple):
    """Identifies a set."""

    name: str
    version: int
    build: dict[str, Scalar]  # all arguments that determine its bytes

    @property
    def fingerprint(self) -> str:
        """Sha256, in hex, of the recipe."""
        return hashlib.sha256(canonical_json(self).encode()).hexdigest()


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
