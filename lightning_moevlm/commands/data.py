"""`moevlm data`: build, convert, check, show and prepare sets of shards.

Plain typed functions; the command line makes options of their arguments and help of their docstrings. What
they need is imported when they run, so that `moevlm --help` stays quick.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from lightning_moevlm.commands import convert
from lightning_moevlm.commands.output import tell_built, written
from lightning_moevlm.errors import UserError

if TYPE_CHECKING:
    from lightning_moevlm.shards.storage import ShardStorage


def build_openmoji(
    out: str = "data/shards/openmoji",
    image_size: int = 64,
    image_format: Literal["jpg", "png"] = "jpg",
    skin_tones: bool = False,
    samples_per_shard: int = 256,
    vocab_size: int = 1024,
    force: bool = False,
) -> None:
    """Build the set `openmoji`: OpenMoji pictures with names in 14 languages (CC BY-SA 4.0).

    Args:
        out: Folder of the set.
        image_size: Pixels per side, 16 to 1024.
        image_format: jpg on a white ground, or png with transparency.
        skin_tones: Whether to include skin-tone variants (they share the split of their base picture).
        samples_per_shard: Samples per tar file.
        vocab_size: Largest number of token ids, at least 260.
        force: Replace a set that was built with other arguments.

    """
    from lightning_moevlm.shards import openmoji

    with written(out):
        manifest, built = openmoji.build_openmoji(
            Path(out), image_size, image_format, skin_tones, samples_per_shard, vocab_size, force
        )
    tell_built(
        out,
        "built" if built else None,
        manifest.digest,
        {split: manifest.num_samples(split) for split in manifest.splits},
    )


def build_scenes(
    out: str = "data/shards/scenes",
    num_samples: int = 3000,
    image_size: int = 64,
    image_format: Literal["jpg", "png"] = "jpg",
    num_pictures: int = 64,
    seed: int = 0,
    samples_per_shard: int = 256,
    vocab_size: int = 1024,
    force: bool = False,
) -> None:
    """Build the set `scenes`: 1-4 pictures on tinted grounds, with captions, questions and scene graphs.

    Args:
        out: Folder of the set.
        num_samples: Scenes over all splits (80 % train, 10 % val, 10 % test).
        image_size: Pixels per side, 32 to 1024.
        image_format: jpg, or png without losses.
        num_pictures: How many different pictures the scenes draw from, 8 to 84.
        seed: Of the scenes; the same seed gives the same scenes, whatever their number.
        samples_per_shard: Samples per tar file.
        vocab_size: Largest number of token ids, at least 260.
        force: Replace a set that was built with other arguments.

    """
    from lightning_moevlm.shards import scenes

    with written(out):
        manifest, built = scenes.build_scenes(
            Path(out),
            num_samples,
            image_size,
            image_format,
            num_pictures,
            seed,
            samples_per_shard,
            vocab_size,
            force,
        )
    tell_built(
        out,
        "built" if built else None,
        manifest.digest,
        {split: manifest.num_samples(split) for split in manifest.splits},
    )


def check(path: str, json: str | None = None, contact_sheet: str | None = None) -> None:
    """Verify every shard and sample of a set against its manifest, and print its card.

    Args:
        path: Folder of the set, or its address (http, https, s3, gs); its shards are kept in the cache.
        json: Write one record per split to this file instead of the table; - is standard output.
        contact_sheet: Also write a PNG with pictures and captions of the validation split to this file.

    """
    from lightning_moevlm.commands import output
    from lightning_moevlm.commands.card import card_of, faults_of
    from lightning_moevlm.shards.check import check_set
    from lightning_moevlm.shards.contact_sheet import write_contact_sheet
    from lightning_moevlm.shards.local import local_target
    from lightning_moevlm.shards.storage import ShardStorage

    storage = ShardStorage(path)
    report = check_set(storage)
    manifest = report.manifest
    if report.problems:
        for problem in report.problems:
            Console(stderr=True, soft_wrap=True, highlight=False).print(problem, markup=False)
        if report.faults:
            Console(stderr=True).print(faults_of(report))
        raise UserError(
            f"{storage} is not in order: {len(report.problems)} problem(s), the first: {report.problems[0]}"
        )
    about = {"set": manifest.name, "licence": manifest.licence, "manifest_digest": manifest.digest}
    with written(json or "the card"):
        output.show(card_of(report, str(storage)), [{**about, **card._asdict()} for card in report.cards], json)
    if contact_sheet is not None:
        sheet = local_target(contact_sheet, "--contact_sheet")
        with written(contact_sheet):
            write_contact_sheet(storage, manifest, "val", 36, sheet)
        Console(stderr=True, highlight=False).print(f"wrote {contact_sheet}")


def show(
    path: str,
    out: str | None = None,
    split: Literal["train", "val", "test"] = "val",
    num_samples: int = 48,
    containing: str | None = None,
) -> None:
    """Write samples of a set as one HTML page: pictures, captions and their tokens, questions, annotations.

    Args:
        path: Folder of the set, or its address (http, https, s3, gs); its shards are kept in the cache.
        out: File to write; by default SET.html beside the set's folder.
        split: Whose samples are shown.
        num_samples: Show so many at most.
        containing: Only samples whose key, caption or json member contains this text, in upper or lower case.

    """
    from lightning_moevlm.shards.local import local_target
    from lightning_moevlm.shards.show import write_page
    from lightning_moevlm.shards.storage import ShardStorage

    storage = ShardStorage(path)
    if out:
        target = local_target(out, "--out")
    else:
        folder = _local(storage).resolve()
        target = folder.with_name(f"{folder.name}.html")
    with written(target):
        page = write_page(storage, split, num_samples, containing, target)
    said = f"wrote {target}: {len(page.samples)} of {page.num_in_split:,} {page.modality} of the {split} split"
    Console(soft_wrap=True, highlight=False).print(said, markup=False)


def codebook(
    path: str,
    num_codes: int = 512,
    patch_size: int = 16,
    seed: int = 0,
    max_samples: int = 20000,
    out: str | None = None,
) -> None:
    """Fit a k-means codebook on patches of a set's training pictures: targets for masked image modelling.

    Args:
        path: Folder of the set, or its address (http, https, s3, gs); its shards are kept in the cache.
        num_codes: Codes, the one for patches of a single grey included.
        patch_size: Pixels per side of a patch; must divide the image size.
        seed: Of the k-means.
        max_samples: Use at most this many training pictures.
        out: File to write; by default codebook-CODESxPATCH.safetensors in the set's folder.

    """
    from lightning_moevlm.shards.codebook import codebook_file, save_codebook
    from lightning_moevlm.shards.fit_codebook import fit_codebook
    from lightning_moevlm.shards.local import local_target
    from lightning_moevlm.shards.storage import ShardStorage

    storage = ShardStorage(path)
    target = local_target(out, "--out") if out else _local(storage) / codebook_file(num_codes, patch_size)
    fitted = fit_codebook(storage, num_codes, patch_size, seed, max_samples)
    with written(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        save_codebook(fitted, target)
    Console().print(f"wrote {target}: {fitted.num_codes} codes of {patch_size}x{patch_size} patches", highlight=False)


def _local(storage: "ShardStorage") -> Path:
    if storage.folder is None:
        raise UserError(f"{storage} is on a server, where nothing is written; say with --out which file to write")
    return storage.folder


Command = Callable[..., None]
COMMANDS: dict[str, Command | dict[str, Command]] = {
    "build": {"openmoji": build_openmoji, "scenes": build_scenes},
    "convert": convert.COMMANDS,
    "check": check,
    "codebook": codebook,
    "show": show,
}
