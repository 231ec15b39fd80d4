"""Writes a folder `config`, `config.1`, `config.2` ... per start of a run: complete or absent, never overwritten."""

import shutil
import tempfile
from collections.abc import Collection, Mapping
from itertools import count
from pathlib import Path


def write_config_folder(directory: Path, files: Mapping[str, str], taken: Collection[str]) -> Path:
    """Write files, content by name, into the first free folder below `directory` and return it.

    taken: folder names in use elsewhere, such as in the artifacts of a run that another machine began.
    """
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".config-", dir=directory))
    try:
        for name, content in files.items():
            (unfinished / name).write_text(content, encoding="utf-8")
        for index in count():
            folder = directory / ("config" if index == 0 else f"config.{index}")
            if folder.name in taken or folder.exists():
                continue
            unfinished.chmod(0o755)  # mkdtemp's folders are private
            return unfinished.rename(folder)
        raise AssertionError("count() ends")
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
