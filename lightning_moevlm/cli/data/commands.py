"""`moevlm data`: builds, converts, checks, shows and prepares sets of shards.

Commands are typed functions: their arguments are the options, and their docstrings the help. They import what they need
when they run, so that `moevlm --help` stays quick.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from lightning_moevlm.cli.data import convert
from lightning_moevlm.cli.data.index import index
from lightning_moevlm.cli.output import print_built
from lightning_moevlm.common.atomic_files import explain_write_errors
from lightning_moevlm.common.errors import UserError

if TYPE_CHECKING:
    from lightning_moevlm.data.inspect.check import CheckReport
    from lightning_moevlm.data.storage.shard_storage import ShardStorage


def build_openmoji(
    out: str = "data/shards/openmoji",
    image_size: int = 64,
    image_format: Literal["jpg", "png"] = "jpg",
    skin_tones: bool = False,
    samples_per_shard: int = 256,
    vocab_size: int = 1024,
    force: bool = False,
) -> None:
    """Build the set `openmoji`: OpenMoji images with names in 14 languages (CC BY-SA 4.0).

    Args:
        out: Folder of the set.
        image_size: Pixels per side, 16 to 1024.
        image_format: jpg on a white ground, or png with transparency.
        skin_tones: Whether to include skin-tone variants (they share the split of their base image).
        samples_per_shard: Samples per tar file.
        vocab_size: Largest number of token ids, at least 260.
        force: Replace a set that was built with other arguments.
    """
    from lightning_moevlm.data.write.demo import openmoji

    with explain_write_errors(out):
        manifest, built = openmoji.build_openmoji(
            Path(out), image_size, image_format, skin_tones, samples_per_shard, vocab_size, force
        )
    print_built(out, "built" if built else None, manifest)


def build_scenes(
    out: str = "data/shards/scenes",
    num_samples: int = 3000,
    image_size: int = 64,
    image_format: Literal["jpg", "png"] = "jpg",
    num_drawings: int = 64,
    seed: int = 0,
    samples_per_shard: int = 256,
    vocab_size: int = 1024,
    force: bool = False,
) -> None:
    """Build the set `scenes`: 1-4 drawings on tinted grounds, with captions, questions and scene graphs.

    Args:
        out: Folder of the set.
        num_samples: Scenes over all splits (80 % train, 10 % val, 10 % test).
        image_size: Pixels per side, 32 to 1024.
        image_format: jpg, or lossless png.
        num_drawings: Number of different drawings in the scenes, 8 to 84.
        seed: Seed of the scenes; a larger set begins with the scenes of a smaller one.
        samples_per_shard: Samples per tar file.
        vocab_size: Largest number of token ids, at least 260.
        force: Replace a set that was built with other arguments.
    """
    from lightning_moevlm.data.write.demo import scenes

    with explain_write_errors(out):
        manifest, built = scenes.build_scenes(
            Path(out), num_samples, image_size, image_format, num_drawings, seed, samples_per_shard, vocab_size, force
        )
    print_built(out, "built" if built else None, manifest)


def build_facts(
    out: str = "data/shards/facts",
    num_samples: int = 4096,
    image_size: int = 32,
    image_format: Literal["jpg", "png"] = "jpg",
    num_drawings: int = 32,
    num_relations: int = 8,
    seed: int = 0,
    samples_per_shard: int = 512,
    vocab_size: int = 512,
    force: bool = False,
) -> None:
    """Build the set `facts`: drawings with random facts that a model has to learn by heart.

    Args:
        out: Folder of the set.
        num_samples: Samples over all splits (80 % train, 10 % val, 10 % test); each round goes through all facts.
        image_size: Pixels per side, 32 to 1024.
        image_format: jpg, or lossless png.
        num_drawings: Number of different drawings, 8 to 84.
        num_relations: Facts about each drawing, 1 to 8.
        seed: Seed of facts and images; a larger set begins with the samples of a smaller one.
        samples_per_shard: Samples per tar file.
        vocab_size: Largest number of token ids, at least 260.
        force: Replace a set that was built with other arguments.
    """
    from lightning_moevlm.data.write.demo import facts

    with explain_write_errors(out):
        manifest, built = facts.build_facts(
            Path(out),
            num_samples,
            image_size,
            image_format,
            num_drawings,
            num_relations,
            seed,
            samples_per_shard,
            vocab_size,
            force,
        )
    print_built(out, "built" if built else None, manifest)


def check(path: str, json: str | None = None) -> None:
    """Verify every shard and sample of a set against its manifest, and print a summary.

    Args:
        path: Folder of the set, or its address (http, https, s3, gs); its shards are kept in the cache.
        json: Write one record per split to this file instead of the table; - is standard output.
    """
    from lightning_moevlm.cli import output
    from lightning_moevlm.data.inspect.check import check_set
    from lightning_moevlm.data.storage.shard_storage import ShardStorage

    storage = ShardStorage(path)
    report = check_set(storage)
    manifest = report.manifest
    if report.problems:
        for problem in report.problems:
            Console(stderr=True, soft_wrap=True, highlight=False).print(problem, markup=False)
        if report.faults:
            Console(stderr=True).print(tabulate_faults(report))
        raise UserError(f"{storage} has {len(report.problems)} problem(s), the first: {report.problems[0]}")
    about = {"set": manifest.name, "licence": manifest.licence, "manifest_digest": manifest.digest}
    with explain_write_errors(json or "the card"):
        output.show(tabulate_card(report, str(storage)), [{**about, **card._asdict()} for card in report.cards], json)


def show(
    path: str,
    out: str | None = None,
    split: Literal["train", "val", "test"] = "val",
    num_samples: int = 48,
    containing: str | None = None,
) -> None:
    """Write samples of a set as one HTML page: images, captions and their tokens, questions, annotations.

    Args:
        path: Folder of the set, or its address (http, https, s3, gs); its shards are kept in the cache.
        out: File to write; by default SET.html beside the set's folder.
        split: Split to show.
        num_samples: Largest number of samples to show.
        containing: Only samples whose key, caption or json member contains this text, in upper or lower case.
    """
    from lightning_moevlm.data.inspect.html_page import write_page
    from lightning_moevlm.data.storage.local import local_target
    from lightning_moevlm.data.storage.shard_storage import ShardStorage

    storage = ShardStorage(path)
    if out:
        target = local_target(out)
    else:
        folder = _local(storage).resolve()
        target = folder.with_name(f"{folder.name}.html")
    with explain_write_errors(target):
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
    """Fit a k-means codebook on patches of a set's training images: targets for masked image modelling.

    Args:
        path: Folder of the set, or its address (http, https, s3, gs); its shards are kept in the cache.
        num_codes: Number of codes, including the one for uniform grey patches.
        patch_size: Pixels per side of a patch; must divide the image size.
        seed: Seed of the k-means.
        max_samples: Use at most this many training images.
        out: File to write; by default codebook-CODESxPATCH.safetensors in the set's folder.
    """
    from lightning_moevlm.contracts.codebook import codebook_file, save_codebook
    from lightning_moevlm.data.fit_codebook import fit_codebook
    from lightning_moevlm.data.storage.local import local_target
    from lightning_moevlm.data.storage.shard_storage import ShardStorage

    storage = ShardStorage(path)
    target = local_target(out) if out else _local(storage) / codebook_file(num_codes, patch_size)
    fitted = fit_codebook(storage, num_codes, patch_size, seed, max_samples)
    with explain_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        save_codebook(fitted, target)
    Console().print(f"wrote {target}: {fitted.num_codes} codes of {patch_size}x{patch_size} patches", highlight=False)


def answers(path: str, num_answers: int | None = None, annotation: str = "answers", out: str | None = None) -> None:
    """Count the answers to a set's training questions, or its classes: the answer classes for AnswerClassification.

    Args:
        path: Folder of the set, or its address (http, https, s3, gs); its shards are kept in the cache.
        num_answers: Number of answers, the most frequent; null keeps all.
        annotation: What is counted: answers, cls, or a field of the json member that names a class.
        out: File to write; by default answers.json in the set's folder.

    """
    from lightning_moevlm.common.number_checks import check_number
    from lightning_moevlm.contracts.answer_list import ANSWERS_FILE, write_answers
    from lightning_moevlm.data.count_answers import count_answers
    from lightning_moevlm.data.storage.local import local_target
    from lightning_moevlm.data.storage.shard_storage import ShardStorage
    from lightning_moevlm.data.text.annotations import Annotation

    if num_answers is not None:
        check_number("num_answers", num_answers, least=1)
    storage = ShardStorage(path)
    target = local_target(out) if out else _local(storage) / ANSWERS_FILE
    counted, coverage = count_answers(storage, num_answers, Annotation(annotation))
    with explain_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_answers(counted, target)
    Console().print(
        f"wrote {target}: {len(counted.answers):,} answers, which cover {coverage.share:.1%} of "
        f"{coverage.num_questions:,} training samples",
        soft_wrap=True,
        highlight=False,
    )


def _local(storage: "ShardStorage") -> Path:
    if storage.folder is None:
        raise UserError(f"{storage} is on a server, where nothing is written; name a file with --out")
    return storage.folder


Command = Callable[..., object]
COMMANDS: dict[str, Command | dict[str, Command]] = {
    "build": {"facts": build_facts, "openmoji": build_openmoji, "scenes": build_scenes},
    "convert": convert.COMMANDS,
    "index": index,
    "check": check,
    "codebook": codebook,
    "answers": answers,
    "show": show,
}


_SIZES_SHOWN = 4


def tabulate_card(report: "CheckReport", path: str) -> Group:
    """Return the card of a valid set."""
    manifest = report.manifest
    modality = report.cards[0].modality
    total = sum(card.num_samples for card in report.cards)
    lines = [
        f"{manifest.name} ({path}): {total:,} {modality} of {', '.join(manifest.members)}; "
        f"{manifest.tokenizer.vocab_size:,} token ids; digest {manifest.digest[:12]}",
        f"licence {manifest.licence} {manifest.licence_url}".rstrip(),
    ]
    if manifest.attribution:
        lines.append(manifest.attribution)
    columns = ["shards", "samples", "MB"]
    rows = {
        card.split: [f"{card.num_shards:,}", f"{card.num_samples:,}", f"{card.num_bytes / 1e6:.1f}"]
        for card in report.cards
    }
    if modality != "images":
        columns.append("tokens")
        for card in report.cards:
            rows[card.split].append(
                _format_range(card.caption_min, card.caption_median, card.caption_p95, card.caption_max)
            )
    if modality != "texts":
        columns.append("pixels")
        for card in report.cards:
            rows[card.split].append(_format_range(card.side_min, card.side_median, card.side_p95, card.side_max))
    if any(card.num_questions for card in report.cards):
        columns.append("questions")
        for card in report.cards:
            rows[card.split].append(f"{card.num_questions:,}")
    columns += ["twice here", "in earlier split"]
    for card in report.cards:
        rows[card.split] += [f"{card.duplicates_within:,}", f"{card.duplicates_across:,}"]
    table = Table("split", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    for split, cells in rows.items():
        table.add_row(split, *cells)
    return Group(*(Text(line) for line in lines), table, *(Text(line) for line in _write_notes(report)))


def tabulate_faults(report: "CheckReport") -> Table:
    """Return a table of the samples that cannot be used, by cause."""
    table = Table("cause", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("samples", justify="right")
    for cause, num_samples in report.faults.items():
        table.add_row(cause, f"{num_samples:,}")
    return table


def _format_range(*quantiles: int) -> str:
    return " / ".join(f"{number:,}" for number in quantiles)


def _write_notes(report: "CheckReport") -> list[str]:
    notes = ["tokens, pixels of the shorter side: min / median / 95 % / max (pixels: the longest side)"]
    if report.sizes:
        shown = ", ".join(f"{width}x{height} ({num:,})" for (width, height), num in report.sizes[:_SIZES_SHOWN])
        others = f" and {len(report.sizes) - _SIZES_SHOWN:,} other sizes" if len(report.sizes) > _SIZES_SHOWN else ""
        notes.append(f"width x height: {shown}{others}")
    longest = max(card.caption_max for card in report.cards)
    if longest:
        total = sum(card.num_samples for card in report.cards)
        cut = {
            limit: sum(card.cut[limit] * card.num_samples for card in report.cards) / total
            for limit in report.cards[0].cut
        }
        shares = "; ".join(f"{limit}: {share:.1%}" for limit, share in cut.items() if share)
        notes.append(
            f"captions that are cut, by data.max_text_len: {shares + '; ' if shares else ''}"
            f"{longest + 2} and more: none"
        )
    across = sum(card.duplicates_across for card in report.cards)
    if across:
        what = "captions" if report.cards[0].modality == "texts" else "images"
        notes.append(f"{across:,} {what} of an earlier split occur again in a later one, so results on it are too good")
    return notes
