"""`moevlm data index`: a set of tars that stay where they are."""

import os
from functools import partial
from typing import Literal

from lightning_moevlm.cli.data.convert.command import run_conversion
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.storage.local import local_target


def index(
    urls: list[str] | str,
    out: str | None = None,
    licence: str = "not stated",
    licence_url: str = "",
    attribution: str = "",
    name: str | None = None,
    image_member: str | None = None,
    caption_member: str | None = "txt",
    caption_field: str | None = None,
    split: Literal["train", "val", "test"] | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 8192,
    max_bad: int = 0,
    jobs: int | None = None,
    force: bool = False,
) -> None:
    """Read tars once and write the manifest of a set; the tars stay where they are. Run again to resume.

    Args:
        urls: Tars: `s3://bucket/name-{0000..0331}.tar`, a folder, `folder/*.tar`, or a list of these.
        out: Folder of the set; required.
        licence: Licence of the data, such as "CC BY 4.0".
        licence_url: Address of the licence text.
        attribution: Attribution that the licence requires.
        name: Name of the set; by default that of the tars' folder.
        image_member: Extension of the images, as input.jpg for KEY.input.jpg; null takes jpg, png and webp.
        caption_member: Extension of the captions; null for a set of images alone.
        caption_field: Field of KEY.json with the caption, or with a list of captions; each epoch draws one, and
            evaluation counts all.
        split: Split that all the tars are; null deals three or more tars out to train, val and test.
        tokenizer: A tokenizer.json of the tokenizers library; null trains one on the captions.
        vocab_size: Largest number of token ids, at least 260.
        max_bad: Largest number of bad samples to tolerate; they stay in their tars.
        jobs: Processes; by default one per processor.
        force: Replace a set that was made differently.
    """
    from pathlib import Path

    from lightning_moevlm.data.storage.find_tars import find_tars
    from lightning_moevlm.data.write.convert.convert import ConvertOptions
    from lightning_moevlm.data.write.convert.sources.member_names import MemberNames
    from lightning_moevlm.data.write.finish_set import Licence
    from lightning_moevlm.data.write.index_tars import IndexOptions, index_tars

    if out is None:
        raise UserError("moevlm data index needs the folder of the set: --out DIR; the tars stay where they are")
    target = local_target(out)
    options = IndexOptions(
        name,
        Licence(licence, licence_url, attribution),
        vocab_size,
        None if tokenizer is None else Path(tokenizer),
        MemberNames(image_member, caption_member, caption_field),
        split,
    )
    effort = ConvertOptions(max_bad, len(os.sched_getaffinity(0)) if jobs is None else jobs, force)
    tars = find_tars(urls, option="URLS")
    title = "bad samples, which stay in their tars: train with data.max_lost_fraction above 0"
    run_conversion(target, partial(index_tars, tars, target, options, effort), title)
