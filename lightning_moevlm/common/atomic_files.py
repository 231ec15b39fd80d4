"""Writes a file or folder whole or not at all, and turns errors of the file system into one line."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_moevlm.common.errors import UserError


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part.

    A device or pipe, such as /dev/null, is written to and not replaced.

    Raises:
        UserError: the disk is full, or the folder cannot be written; the old text is still there.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with explain_write_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists() and not file.is_file():
                file.write_text(text, encoding="utf-8")
                return
            with beside.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(file)
    except UserError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


@contextmanager
def fill_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, whose files replace those of the same names in `folder` at the end.

    After an error `folder` is as it was: not there, or with its old files.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    home = _existing(folder)
    with explain_write_errors(folder):
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=home))
    try:
        yield unfinished
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for file in unfinished.iterdir():
                file.replace(folder / file.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _existing(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that exists."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())


@contextmanager
def explain_write_errors(
    target: Path | str, remedy: str = "free disk space, grant write permission, or name another path"
) -> Iterator[None]:
    """Turn an OSError within into a `UserError` that names the target and the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{target} could not be written ({error.strerror or error}); {remedy}") from error
    except Exception as error:  # safetensors has a class of its own
        found = str(error).partition("I/O error: ")[2]
        if not found:
            raise
        raise UserError(f"{target} could not be written ({found}); {remedy}") from error


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Write a folder whole or not at all: the block fills one beside it, which then takes its place.

    A folder that is there is kept until then; a link to one stays a link.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    with explain_write_errors(folder):
        folder = folder.resolve()
        unfinished, before = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("new", "before"))
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            if folder.exists():
                folder.rename(before)
            unfinished.rename(folder)
        finally:
            if before.exists() and not folder.exists():
                before.rename(folder)
            for each in (unfinished, before):
                shutil.rmtree(each, ignore_errors=True)


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be written, or cannot be made. Nothing is made here.

    Raises:
        UserError: names the option that gave it.
    """
    existing = _existing(folder)
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UserError(f"{option} = {folder}: {existing} cannot be written. Name a folder that can.")


def check_writable_file(file: Path, option: str) -> None:
    """Refuse a file that cannot be written, before the work that fills it. Nothing is made here.

    Raises:
        UserError: names the option that gave it.
    """
    if file.is_dir():
        raise UserError(f"{option} = {file} is a folder. Name a file.")
    if file.is_file() or not file.exists():  # not a device or pipe
        check_writable(file.parent, option)
