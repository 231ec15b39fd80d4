"""Makes a set of img2dataset's tars without changing them: writes only manifest, tokenizer and licence.

The tars are linked into the set (or copied), or the set is made in their own folder. Whole tars fall into the splits by
the hash of their bytes: every tenth into validation and every tenth into test. So an image can be in two splits.
`moevlm data check` counts such images, and writing samples again (`--keep_tars false`) prevents them. Bad samples that
are tolerated stay in their tars, so `data.max_lost_fraction` must allow them. Tars without a good sample are left out.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.progress import track
from lightning_moevlm.data.format.layout import Layout
from lightning_moevlm.data.format.manifest import MANIFEST_FILE, SPLITS, Scalar, Split
from lightning_moevlm.data.text.tokenizer import TOKENIZER_FILE, check_vocab_size
from lightning_moevlm.data.write.convert.bad_rows import BadRows
from lightning_moevlm.data.write.convert.convert import VERSION, Converted, ConvertOptions
from lightning_moevlm.data.write.convert.inspect_tar import TarReport, inspect_tar
from lightning_moevlm.data.write.convert.process_pool import map_in_order
from lightning_moevlm.data.write.convert.sources.img2dataset import REMEDIES, find_downloads, fingerprint
from lightning_moevlm.data.write.convert.sources.member_names import DEFAULT_NAMES, MemberNames
from lightning_moevlm.data.write.convert.sources.row_source import BadRow, make_set_name
from lightning_moevlm.data.write.convert.work_folder import WorkFolder, open_work_folder
from lightning_moevlm.data.write.finish_set import Contents, Licence, finish_set, typical_size
from lightning_moevlm.data.write.set_folder import Recipe, find_existing_set, put_in_place

T = TypeVar("T")
_HELD_OUT_SHARE = 0.1


def keep_tars(
    folder: Path,
    name: str | None,
    out: Path,
    licence: Licence,
    vocab_size: int,
    effort: ConvertOptions,
    names: MemberNames = DEFAULT_NAMES,
) -> Converted:
    """Make a set of a folder of img2dataset's tars; `out` may be that folder itself.

    Raises:
        UserError: if tars are unfinished or broken, there are fewer than three, more samples are bad than allowed, or
            `out` holds something else.
    """
    check_vocab_size(vocab_size)
    found = find_downloads(folder)
    arguments: dict[str, Scalar] = {
        "source": "img2dataset",
        "keep_tars": True,
        "table": fingerprint(found),
        "vocab_size": vocab_size,
        **names.as_arguments(),
    }
    recipe = Recipe(make_set_name(name or folder.resolve().name), VERSION, {**arguments, **licence.as_arguments()})
    in_place = out.resolve() == folder.resolve()
    if not in_place or (out / MANIFEST_FILE).is_file():
        there = find_existing_set(out, recipe, effort.force)
        if there is not None:
            return Converted(there, False, ())
    refuse_few(str(folder), len(found))
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_work_folder(out, recipe.fingerprint) as work:
        keys = {download: f"tar-{download.file}" for download in found}
        inspect = partial(inspect_tar, folder=folder, names=names)
        reports = inspect_all(keys, inspect, lambda download: str(folder / download.file), effort.num_jobs, work)
        contents, bad = describe(reports, names, effort.max_bad, str(folder))
        manifest = finish_set(work.folder, recipe, licence, contents, vocab_size)
        if in_place:
            for file in (TOKENIZER_FILE, "LICENCE.txt", MANIFEST_FILE):
                (work.folder / file).replace(out / file)
            shutil.rmtree(work.folder)
        else:
            entries = [entry for some in contents.splits.values() for entry in some]
            for entry in track(entries, len(entries), "linking tars"):
                _link(folder / entry.file, work.folder / entry.file)
            work.tidy()
            put_in_place(work.folder, out)
    return Converted(manifest, True, bad.counts(), sum(report.entry.num_samples for report in reports))


def refuse_few(place: str, num_tars: int, which: str = "", remedy: str = "--keep_tars false") -> None:
    """Refuse fewer tars than splits. which: what was counted, after a blank."""
    if num_tars < 3:
        raise UserError(
            f"{place} holds {num_tars} tars{which}, but training, validation and test need one each; write the "
            f"samples again with {remedy}"
        )


def inspect_all(
    found: Mapping[T, str],
    inspect: Callable[[T], TarReport],
    place: Callable[[T], str],
    num_jobs: int,
    work: WorkFolder,
) -> list[TarReport]:
    """Inspect tars in several processes; reports of earlier attempts are kept.

    Args:
        found: the tars, with the names of their reports in the work folder.
        inspect: returns the report of a tar; it runs in another process.
        place: path or address of a tar, for messages.
        num_jobs: processes.
        work: keeps reports.

    Raises:
        UserError: a tar is broken, or has texts that nothing would read.
    """
    known = [work.recall(name, TarReport) for name in found.values()]
    todo = [tar for tar, report in zip(found, known, strict=True) if report is None]
    reports: list[TarReport] = []
    with closing(map_in_order(inspect, todo, min(num_jobs, len(todo)))) as fresh:
        for (tar, name), earlier in zip(found.items(), track(known, len(known), "inspecting tars"), strict=True):
            report = next(fresh) if earlier is None else earlier
            if earlier is None and not report.bad:  # bad samples are inspected again: they may be corrected
                work.remember(name, report)
            if report.unread and not any(before.captions for before in reports):
                raise UserError(f"{place(tar)}: {report.unread}")
            reports.append(report)
    return reports


class Described(NamedTuple):
    """A set's content, and its bad samples."""

    contents: Contents
    bad: BadRows


def describe(
    reports: list[TarReport],
    names: MemberNames,
    max_bad: int,
    place: str,
    remedy: str = "--keep_tars false",
    split: Split | None = None,
) -> Described:
    """Return the content of a set that consists of tars.

    Args:
        reports: of its tars.
        names: of their members.
        max_bad: bad samples allowed.
        place: of the tars, for messages.
        remedy: the command or option that writes samples again.
        split: of all tars; None deals them out.

    Raises:
        UserError: more samples are bad, none can be used, or too few tars have good ones.
    """
    chosen, bad = _choose_members(reports, names), BadRows(REMEDIES)
    for row in (row for report in reports for row in report.bad):
        bad.add(row)
    for report in reports:
        for row in _find_lacking(report, chosen):
            bad.add(row)
    bad.refuse_beyond(max_bad, sum(report.entry.num_samples for report in reports))
    if not any(report.choices for report in reports):
        raise UserError(
            f"no sample in {place} can be used: name the extensions of images and captions with --image_member and "
            "--caption_member, or download the tars again"
        )
    full = [report for report in reports if any(chosen.required <= set(choice.split()) for choice in report.choices)]
    if split is None:
        refuse_few(place, len(full), " with a sample that can be used", remedy)
        splits = _deal(full)
    else:
        splits = {each: full if each == split else [] for each in SPLITS}
    contents = Contents(
        image_size=typical_size(Counter(side for report in reports for side in report.sides)),
        members=chosen.members,
        texts=(caption for report in splits["train"] for caption in report.captions),
        splits={split: tuple(report.entry for report in some) for split, some in splits.items()},
        layout=chosen.layout,
    )
    return Described(contents, bad)


class _SetMembers(NamedTuple):
    """The members that the set promises."""

    members: tuple[str, ...]
    layout: Layout
    required: frozenset[str]  # extensions that good samples must have


def _choose_members(reports: list[TarReport], names: MemberNames) -> _SetMembers:
    """Choose the members that the set promises, from those of good samples.

    Images are the member jpg or png if all have that format, by their bytes; otherwise the member image. Texts are
    promised if any sample has one. Annotations, which training does not read, are promised if all samples have one.
    """
    choices = Counter[frozenset[str]]()
    images = Counter[str]()
    for report in reports:
        images.update(report.images)
        choices.update({frozenset(choice.split()): num for choice, num in report.choices.items()})
    required = frozenset({names.text} & frozenset().union(*choices)) if names.text is not None else frozenset()
    stored_as: dict[str, tuple[str, ...]] = {}
    formats = {image.split()[1] for image in images}
    image = "jpg" if formats == {"JPEG"} else "png" if formats == {"PNG"} else "image"
    stored_as[image] = tuple(name for name in names.images if any(found.split()[0] == name for found in images))
    members = [image]
    if required and names.caption_field is None:
        members.append("txt")
        stored_as["txt"] = tuple(required)
    if "json" in required or (choices and all("json" in choice for choice in choices if choice >= required)):
        members.append("json")
    different = {member: found for member, found in stored_as.items() if found != (member,)}
    keys = Counter(key for report in reports for key in report.keys)
    repeat = any(num > 1 for num in keys.values())
    return _SetMembers(tuple(sorted(members)), Layout(different, names.caption_field or "", repeat), required)


def _find_lacking(report: TarReport, chosen: _SetMembers) -> Iterator[BadRow]:
    """Yield a bad row per sample without a promised member."""
    for choice, num in report.choices.items():
        lacks = ", ".join(f".{extension}" for extension in sorted(chosen.required - set(choice.split())))
        if lacks:
            row = BadRow(
                report.entry.file, "member_missing", f"{num} of its samples have no {lacks}, while others have"
            )
            yield from [row] * num


def _deal(reports: list[TarReport]) -> dict[Split, list[TarReport]]:
    """Assign three or more tars to splits by the hash of their bytes; each split is ordered by name."""
    mixed = sorted(reports, key=lambda report: report.entry.sha256)
    num_held_out = max(1, round(len(reports) * _HELD_OUT_SHARE))
    splits: dict[Split, list[TarReport]] = {
        "train": mixed[2 * num_held_out :],
        "val": mixed[:num_held_out],
        "test": mixed[num_held_out : 2 * num_held_out],
    }
    return {split: sorted(some, key=lambda report: report.entry.file) for split, some in splits.items()}


def _link(tar: Path, target: Path) -> None:
    """Link a tar; copy it if the file system has no links."""
    if target.exists():
        return  # an earlier attempt has linked or completely copied it
    try:
        os.link(tar.resolve(), target)
    except OSError:
        unfinished = target.with_name(f".{target.name}.unfinished")
        shutil.copyfile(tar, unfinished)
        unfinished.replace(target)
