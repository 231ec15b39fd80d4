"""Finds the tars that a user names: addresses with braces, patterns, folders, or lists of these."""

from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.data.storage.shard_storage import PROTOCOLS, ShardStorage

_WILD = ("*", "?", "[")


class FoundTar(NamedTuple):
    """A tar in a folder or on a server."""

    storage: ShardStorage
    file: str

    @property
    def place(self) -> str:
        """Its path or address without credentials."""
        return self.storage.place(self.file)


def find_tars(
    urls: str | Sequence[str], allowed_protocols: tuple[str, ...] = PROTOCOLS, option: str = "data.urls"
) -> tuple[FoundTar, ...]:
    """Return the named tars in the order of their names, each once.

    Args:
        urls: `s3://bucket/cc3m-{0000..0331}.tar`, `folder/*.tar`, a folder, or several of these.
        allowed_protocols: of addresses.
        option: that names them, for messages.

    Raises:
        UserError: a pattern is malformed or matches nothing, or a folder holds no tar.
    """
    found: dict[str, FoundTar] = {}
    for url in [urls] if isinstance(urls, str) else urls:
        some = [tar for each in _expand_braces(url, option) for tar in _find(each, allowed_protocols)]
        if not some:
            raise UserError(
                f"{option} {mask_url_secrets(url)} matches no tar: name tars as 'folder/name-{{0000..0331}}.tar', or "
                "the folder that holds them"
            )
        found |= {f"{tar.storage.root}/{tar.file}": tar for tar in some}
    if not found:
        raise UserError(f"{option} names no tar: give addresses such as 's3://bucket/name-{{0000..0331}}.tar'")
    return tuple(found.values())


def _expand_braces(url: str, option: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    if url.startswith(("pipe:", "|")):
        ShardStorage(url)  # raises
    try:
        return expand_urls(url)
    except (ValueError, AssertionError) as error:  # of a brace, or a variable that is not set
        raise UserError(f"{option} {mask_url_secrets(url)} is not a valid pattern ({error})") from None


def _find(url: str, allowed_protocols: tuple[str, ...]) -> list[FoundTar]:
    scheme, host, path, query, _ = urlsplit(url) if "://" in url else ("", "", url, "", "")
    above, _, name = path.rpartition("/")
    is_wild = any(mark in name for mark in _WILD)
    if not is_wild and not name.endswith((".tar", ".tar.gz", ".tgz")):
        above, name, is_wild = path.rstrip("/"), "*.tar", True
    folder = above or ("/" if path.startswith("/") else "" if scheme else ".")
    storage = ShardStorage(
        urlunsplit((scheme, host, folder, query, "")) if scheme else folder, allowed_protocols=allowed_protocols
    )
    return [FoundTar(storage, each) for each in (storage.files(name) if is_wild else [name])]
