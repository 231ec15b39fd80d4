"""Indexes tars where they are: reads each once, and writes the manifest that makes reading them exact.

The tars stay in their folder or on their server; the set holds their names, sizes and hashes, the tokenizer and the
licence. Tars on a server are fetched one by one into the work folder and removed again. Reports of finished tars are
kept after a kill or an error, so that the same command goes on.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import SPLIT, Scalar, Split
from lightning_moevlm.data.storage.find_tars import FoundTar
from lightning_moevlm.data.text.tokenizer import check_vocab_size, read_tokenizer
from lightning_moevlm.data.write.convert.convert import VERSION, Converted, ConvertOptions
from lightning_moevlm.data.write.convert.inspect_tar import TarReport, inspect_tar
from lightning_moevlm.data.write.convert.keep_tars import describe, inspect_all, refuse_few
from lightning_moevlm.data.write.convert.sources.img2dataset import Download
from lightning_moevlm.data.write.convert.sources.member_names import DEFAULT_NAMES, MemberNames
from lightning_moevlm.data.write.convert.sources.row_source import make_set_name
from lightning_moevlm.data.write.convert.work_folder import open_work_folder
from lightning_moevlm.data.write.finish_set import Licence, finish_set
from lightning_moevlm.data.write.set_folder import Recipe, find_existing_set, put_in_place

_REMEDY = (
    "`moevlm data convert img2dataset FOLDER --keep_tars false`; train without an index, which holds out the last tar: "
    "--data.root null --data.urls URLS; or index them as one split: --split train, val or test"
)
_COPIED_BYTES = 2**20


class IndexOptions(NamedTuple):
    """What an index is made of."""

    name: str | None  # of the set; None: of the tars' folder
    licence: Licence
    vocab_size: int
    tokenizer: Path | None = None  # a user's own; None trains one
    names: MemberNames = DEFAULT_NAMES
    split: Split | None = None  # of all tars; None deals them out to three


def index_tars(tars: Sequence[FoundTar], out: Path, options: IndexOptions, effort: ConvertOptions) -> Converted:
    """Write a set of tars that stay where they are.

    Raises:
        UserError: the tars lie in several folders, are missing, broken or fewer than three without a split, more
            samples are bad than allowed, a tokenizer is missing, or `out` holds something else.
    """
    check_vocab_size(options.vocab_size)
    if options.split in ("val", "test") and options.tokenizer is None:
        raise UserError(
            f"--split {options.split} needs --tokenizer FILE, that of the training set: a tokenizer is not made of "
            "held-out captions"
        )
    if options.tokenizer is not None:
        read_tokenizer(options.tokenizer)
    place = _place_of(tars)
    arguments: dict[str, Scalar] = {
        "source": "index",
        "tars": hashlib.sha256(json.dumps([place, *(tar.file for tar in tars)]).encode()).hexdigest(),
        "vocab_size": options.vocab_size,
        **({} if options.tokenizer is None else {"tokenizer": _sha256(options.tokenizer)}),
        **options.names.as_arguments(),
        **({} if options.split is None else {SPLIT: options.split}),
    }
    name = make_set_name(options.name or urlsplit(place).path.rstrip("/").rpartition("/")[2] or "tars")
    recipe = Recipe(name, VERSION, {**arguments, **options.licence.as_arguments()})
    there = find_existing_set(out, recipe, effort.force)
    if there is not None:
        return Converted(there, False, ())
    if options.split is None:
        refuse_few(place, len(tars), remedy=_REMEDY)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_work_folder(out, recipe.fingerprint, keeps=True) as work:
        fetched = work.folder / "fetched"
        shutil.rmtree(fetched, ignore_errors=True)  # of an attempt that was killed
        inspect = partial(_inspect, names=options.names, folder=fetched)
        reports = inspect_all({tar: _task(tar) for tar in tars}, inspect, lambda tar: tar.place, effort.num_jobs, work)
        contents, bad = describe(reports, options.names, effort.max_bad, place, _REMEDY, options.split)
        contents = contents._replace(shards_at=place, tokenizer_file=options.tokenizer)
        manifest = finish_set(work.folder, recipe, options.licence, contents, options.vocab_size)
        shutil.rmtree(fetched, ignore_errors=True)
        work.tidy()
        put_in_place(work.folder, out)
    return Converted(manifest, True, bad.counts(), sum(report.entry.num_samples for report in reports))


def _place_of(tars: Sequence[FoundTar]) -> str:
    """Return the one folder or address of the tars, as the manifest names it."""
    places = sorted({tar.storage.root for tar in tars})
    if len(places) > 1:
        shown = ", ".join(str(tar.storage) for tar in {tar.storage.root: tar for tar in tars}.values())
        raise UserError(f"the tars lie in {len(places)} places ({shown}): index each, and mix them with data.sources")
    (place,) = places
    if "://" not in place:
        return str(Path(place).resolve())
    parts = urlsplit(place)
    if parts.query or "@" in parts.netloc:
        raise UserError(
            f"{tars[0].storage} is given with a signature or a password, which an index does not keep: give the bare "
            "address, and the keys in the environment"
        )
    return place


def _task(tar: FoundTar) -> str:
    """Return the name of a tar's report; a local tar that has changed gets another."""
    if tar.storage.folder is None:
        return f"tar-{tar.file}"
    try:
        stat = (tar.storage.folder / tar.file).stat()
    except OSError:
        return f"tar-{tar.file}"  # its inspection says what is wrong
    return f"tar-{tar.file}-{stat.st_size}-{stat.st_mtime_ns}"


def _inspect(tar: FoundTar, names: MemberNames, folder: Path) -> TarReport:
    """Inspect a tar in place, or a copy of one on a server."""
    download = Download(tar.file, None, 0)
    if tar.storage.folder is not None:
        tar.storage.stream(tar.file).close()  # says which tar is missing
        return inspect_tar(download, tar.storage.folder, names)
    own = folder / str(os.getpid())
    own.mkdir(parents=True, exist_ok=True)
    try:
        with tar.storage.stream(tar.file) as source, (own / tar.file).open("wb") as target:
            shutil.copyfileobj(source, target, _COPIED_BYTES)
        return inspect_tar(download, own, names)
    except UserError as error:
        raise UserError(str(error).replace(str(own / tar.file), tar.place)) from None
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
