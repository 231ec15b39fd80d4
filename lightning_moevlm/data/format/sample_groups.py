"""Groups the members of a tar into samples: one rule for conversion, checks, `show` and training.

The rule is WebDataset's (`webdataset.tariterators`: `base_plus_ext`, `group_by_keys`). A key is the path up to the
first dot of the file name, so its folder belongs to it: `cat/0001.jpg` and `dog/0001.txt` are two samples. Members of
one sample stand side by side. An extension that comes again begins another sample of the same key.

Files whose name begins with a dot are ignored. macOS puts them into archives (`._0001.jpg`, `.DS_Store`), where they
would split samples in two.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from lightning_moevlm.data.format.manifest import OTHER_SPELLINGS
from lightning_moevlm.data.format.tar_members import Member, TarBreak

_META = re.compile(r"__[^/]*__($|/)")
"""Names that WebDataset ignores."""


@lru_cache(maxsize=1)  # called twice in a row for every name: is it wanted, and to which sample does it belong
def key_and_extension(name: str) -> tuple[str, str]:
    """Return the key and the extension of a member's name; two empty texts if it does not belong to a sample.

    Extensions are in lower case and the usual spelling: `KEY.JPEG` is the member `jpg`.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not stem or not dot or (name.startswith("__") and _META.match(name)):
        return "", ""
    lower = extension.lower()
    return f"{folder}{slash}{stem}", OTHER_SPELLINGS.get(lower, lower)


class Group(NamedTuple):
    """Consecutive members of one key."""

    key: str
    members: dict[str, Member]  # by extension
    cut: bool  # the tar broke here, so members may be missing


def sample_groups(members: Iterator[Member]) -> Iterator[Group]:
    """Group members by key.

    Raises:
        TarBreak: after the last group, if the tar breaks.
    """
    key: str | None = None
    found: dict[str, Member] = {}
    try:
        for member in members:
            base, extension = key_and_extension(member.name)
            if not base:
                continue
            if key is not None and (base != key or extension in found):
                yield Group(key, found, cut=False)
                found = {}
            key = base
            found[extension] = member
    except TarBreak:
        if key is not None:
            yield Group(key, found, cut=True)
        raise
    if key is not None:
        yield Group(key, found, cut=False)
