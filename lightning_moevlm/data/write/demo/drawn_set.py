"""Builds a set of drawn samples: whole, once, or not at all."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.common.progress import track
from lightning_moevlm.data.format.manifest import Manifest, Scalar
from lightning_moevlm.data.images.encode import ImageFormat
from lightning_moevlm.data.write.demo.openmoji_art import LICENCE, LICENCE_URL, PACKAGES, attribution
from lightning_moevlm.data.write.finish_set import Contents, Licence, finish_set
from lightning_moevlm.data.write.set_folder import Recipe, find_existing_set, put_in_place
from lightning_moevlm.data.write.shard_writer import Sample, ShardWriter


class SetForm(NamedTuple):
    """The form of a set's images, tars and texts; a part of its recipe."""

    image_size: int  # pixels per side
    image_format: ImageFormat
    samples_per_shard: int
    vocab_size: int


class DrawnSet(NamedTuple):
    """A set of samples that are drawn from OpenMoji's art.

    name, version: of the recipe; the version is raised when the same arguments give other samples.
    arguments: of the recipe, beside the form.
    change: sentence on the changes to the art, for the attribution.
    num_samples: of `samples`.
    samples: in order; nothing is drawn before the first one is taken.
    packages: whose versions the bytes depend on.
    """

    name: str
    version: int
    form: SetForm
    arguments: dict[str, Scalar]
    change: str
    num_samples: int
    samples: Iterable[Sample]
    packages: tuple[str, ...] = PACKAGES


def build_drawn(out: Path, drawn: DrawnSet, force: bool) -> tuple[Manifest, bool]:
    """Build the set in `out`; return its manifest and whether it was built now.

    Raises:
        UserError: if `out` holds something else, a split stays empty, or a number of the form is out of range.
    """
    recipe = Recipe(drawn.name, drawn.version, {**drawn.arguments, **drawn.form._asdict()})
    found = find_existing_set(out, recipe, force)
    if found is not None:
        return found, False
    check_number("samples_per_shard", drawn.form.samples_per_shard, least=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.building-", dir=out.parent))
    try:
        manifest = _fill(building, drawn, recipe)
        building.chmod(0o755)
        put_in_place(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return manifest, True


def _fill(root: Path, drawn: DrawnSet, recipe: Recipe) -> Manifest:
    captions: list[str] = []
    with ShardWriter(root, drawn.form.samples_per_shard) as writer:
        for sample in track(drawn.samples, drawn.num_samples, f"building {drawn.name}"):
            if writer.write(sample) == "train":
                captions.append(sample.caption)
    for split, shards in writer.entries.items():
        if not shards:
            raise UserError(f"num_samples {drawn.num_samples} leaves the {split} split empty: raise it")
    licence = Licence(LICENCE, LICENCE_URL, attribution(drawn.change))
    members = tuple(sorted(("json", "txt", drawn.form.image_format)))
    contents = Contents(drawn.form.image_size, members, captions, writer.entries, packages=drawn.packages)
    return finish_set(root, recipe, licence, contents, drawn.form.vocab_size)
