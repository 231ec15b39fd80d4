"""img2dataset's tars as a set just as they are: only the manifest, the tokenizer and the licence are written.

The tars are linked into the set (copied where links are not possible), or the set is made in their own folder.
What is left as it is cannot be dealt out by picture: whole tars fall into the splits, every tenth into validation and
into test, by the hash of their bytes. The same picture may so be in two splits; `moevlm data check` counts them, and
writing the samples anew (`--keep_tars false`) prevents it. Bad samples that are borne stay in their tars, where the
loader meets them: `data.max_lost_fraction` must bear them too. Tars without a good sample are left out.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.progress import track
from lightning_moevlm.data.format.layout import Layout
from lightning_moevlm.data.format.manifest import MANIFEST_FILE, Scalar, ShardEntry, Split
from lightning_moevlm.data.text.tokenizer import TOKENIZER_FILE, check_vocab_size
from lightning_moevlm.data.write.build_set import existing_set, put_in_place
from lightning_moevlm.data.write.convert.bad_rows import BadRows
from lightning_moevlm.data.write.convert.convert import VERSION, Converted, Effort
from lightning_moevlm.data.write.convert.finish_set import Contents, ConvertRecipe, Terms, finish, usual_size
from lightning_moevlm.data.write.convert.inspect_tar import TarLook, look_at_tar
from lightning_moevlm.data.write.convert.process_pool import in_order
from lightning_moevlm.data.write.convert.sources.img2dataset import REMEDIES, Download, downloads, fingerprint
from lightning_moevlm.data.write.convert.sources.member_names import USUAL, MemberNames
from lightning_moevlm.data.write.convert.sources.row_source import BadRow, set_name
from lightning_moevlm.data.write.convert.work_folder import Workshop, workshop

_HELD_OUT_SHARE = 0.1


def keep_tars(
    folder: Path,
    name: str | None,
    out: Path,
    terms: Terms,
    vocab_size: int,
    effort: Effort,
    names: MemberNames = USUAL,
) -> Converted:
    """Make a set of a folder that img2dataset has filled; `out` may be that folder itself.

    Raises:
        UserError: if tars are not finished or not whole, there are fewer than three, more samples are bad than allowed,
            or `out` holds something else.

    """
    check_vocab_size(vocab_size)
    found = downloads(folder)
    arguments: dict[str, Scalar] = {
        "source": "img2dataset",
        "keep_tars": True,
        "table": fingerprint(found),
        "vocab_size": vocab_size,
        **names.as_arguments(),
    }
    recipe = ConvertRecipe(set_name(name or folder.resolve().name), VERSION, {**arguments, **terms.as_arguments()})
    in_place = out.resolve() == folder.resolve()
    if not in_place or (out / MANIFEST_FILE).is_file():
        there = existing_set(out, recipe, effort.force)
        if there is not None:
            return Converted(there, False, ())
    _refuse_few(folder, len(found), "")
    out.parent.mkdir(parents=True, exist_ok=True)
    with workshop(out, recipe.fingerprint) as shop:
        looks = _look_at_all(folder, found, names, effort.num_jobs, shop)
        kept, bad = _kept(looks, names), BadRows(REMEDIES)
        for row in (row for look in looks for row in look.bad):
            bad.add(row)
        for look in looks:
            for row in _lacking(look, kept):
                bad.add(row)
        num_samples = sum(look.entry.num_samples for look in looks)
        bad.refuse_beyond(effort.max_bad, num_samples)
        if not any(look.choices for look in looks):
            raise UserError(f"none of the samples in {folder} can be used, so there is nothing to make a set of")
        full = [look for look in looks if any(kept.required <= set(choice.split()) for choice in look.choices)]
        _refuse_few(folder, len(full), " with a sample that can be used")
        dealt = _dealt(full)
        contents = Contents(
            image_size=usual_size(Counter(side for look in looks for side in look.sides)),
            members=kept.members,
            texts=(caption for look in dealt["train"] for caption in look.captions),
            splits={split: tuple(look.entry for look in some) for split, some in dealt.items()},
            layout=kept.layout,
        )
        manifest = finish(shop.folder, recipe, terms, contents, vocab_size)
        if in_place:
            for file in (TOKENIZER_FILE, "LICENCE.txt", MANIFEST_FILE):
                (shop.folder / file).replace(out / file)
            shutil.rmtree(shop.folder)
        else:
            for look in track(full, len(full), "linking tars"):
                _link(folder / look.entry.file, shop.folder / look.entry.file)
            shop.tidy()
            put_in_place(shop.folder, out)
    return Converted(manifest, True, bad.counts(), num_samples)


def _refuse_few(folder: Path, num_tars: int, which: str) -> None:
    if num_tars < 3:
        raise UserError(
            f"{folder} holds {num_tars} tars{which}, but training, validation and test need one each; write the "
            "samples anew with --keep_tars false"
        )


def _look_at_all(
    folder: Path, found: tuple[Download, ...], names: MemberNames, num_jobs: int, shop: Workshop
) -> list[TarLook]:
    known = [_recalled(shop.recall(f"tar-{download.file}")) for download in found]
    todo = [download for download, look in zip(found, known, strict=True) if look is None]
    looks: list[TarLook] = []
    with closing(in_order(partial(look_at_tar, folder=folder, names=names), todo, min(num_jobs, len(todo)))) as fresh:
        for download, earlier in zip(found, track(known, len(known), "looking at tars"), strict=True):
            look = next(fresh) if earlier is None else earlier
            if earlier is None and not look.bad:  # a bad sample may be mended, and is looked at again
                shop.remember(f"tar-{download.file}", asdict(look))
            if look.unread and not any(before.captions for before in looks):
                raise UserError(f"{folder / download.file}: {look.unread}")
            looks.append(look)
    return looks


def _recalled(noted: Any) -> TarLook | None:
    if not isinstance(noted, dict) or noted.keys() != TarLook.__annotations__.keys():
        return None
    entry, bad = ShardEntry(**noted.pop("entry")), [BadRow(*row) for row in noted.pop("bad")]
    return TarLook(entry=entry, bad=bad, **noted)


class _Kept(NamedTuple):
    """Members that the set promises, and where they lie. required: extensions that good samples must have."""

    members: tuple[str, ...]
    layout: Layout
    required: frozenset[str]


def _kept(looks: list[TarLook], names: MemberNames) -> _Kept:
    """Say what the set promises of what was found in good samples.

    Images are the member jpg or png if all of them are of that format, by their bytes, else the member image. Texts are
    promised if any sample has one. Annotations, which training does not read, are promised if all have one.
    """
    choices = Counter[frozenset[str]]()
    images = Counter[str]()
    for look in looks:
        images.update(look.images)
        choices.update({frozenset(choice.split()): num for choice, num in look.choices.items()})
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
    keys = Counter(key for look in looks for key in look.keys)
    repeat = any(num > 1 for num in keys.values())
    return _Kept(tuple(sorted(members)), Layout(different, names.caption_field or "", repeat), required)


def _lacking(look: TarLook, kept: _Kept) -> Iterator[BadRow]:
    """Yield one bad row per good sample that lacks what the set promises; all good ones have a picture."""
    for choice, num in look.choices.items():
        lacks = ", ".join(f".{extension}" for extension in sorted(kept.required - set(choice.split())))
        if lacks:
            row = BadRow(look.entry.file, "member_missing", f"{num} of its samples have no {lacks}, while others have")
            yield from [row] * num


def _dealt(looks: list[TarLook]) -> dict[Split, list[TarLook]]:
    """Deal three or more tars out, by the hash of their bytes; within a split they keep the order of their names."""
    mixed = sorted(looks, key=lambda look: look.entry.sha256)
    num_held_out = max(1, round(len(looks) * _HELD_OUT_SHARE))
    dealt: dict[Split, list[TarLook]] = {
        "train": mixed[2 * num_held_out :],
        "val": mixed[:num_held_out],
        "test": mixed[num_held_out : 2 * num_held_out],
    }
    return {split: sorted(some, key=lambda look: look.entry.file) for split, some in dealt.items()}


def _link(tar: Path, target: Path) -> None:
    """Give a tar a second name; where the file system cannot, copy it."""
    if target.exists():
        return  # an earlier attempt has linked it; a copy only gets its name when it is whole
    try:
        os.link(tar.resolve(), target)
    except OSError:
        unfinished = target.with_name(f".{target.name}.unfinished")
        shutil.copyfile(tar, unfinished)
        unfinished.replace(target)
