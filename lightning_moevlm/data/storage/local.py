"""Folders and files on this machine, where sets are made; an address is answered with the way round."""

import re
from pathlib import Path

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import mask_url_secrets

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(.*)")
_COPIES = {"s3": "aws s3 sync {address} FOLDER", "gs": "gsutil -m rsync -r {address} FOLDER"}


def local_source(text: str, option: str) -> Path:
    """Return the path of what is to be read.

    Raises:
        UserError: if it is an address, with a command that copies what is there.

    """
    address = _address(text)
    if address is None:
        return Path(text)
    scheme, shown = address
    copy = _COPIES.get(scheme, "rclone copy {address} FOLDER").format(address=shown)
    raise UserError(
        f"{option} {shown} is an address, but conversions read local folders only; copy it, as with `{copy}`, and name "
        "the copy"
    )


def local_target(text: str, option: str) -> Path:
    """Return the path of what is to be written. A path that was an address is one too.

    Raises:
        UserError: if it is an address.

    """
    address = _address(text)
    if address is not None or text.startswith("pipe:"):
        shown = text if address is None else address[1]
        raise UserError(f"{option} {shown} is an address, but this is written to local folders only; give a path")
    return Path(text)


def _address(text: str) -> tuple[str, str] | None:
    """Return scheme and whole of an address, without secrets; also of one that `Path` has taken a slash from."""
    found = _ADDRESS.fullmatch(text)
    return None if found is None else (found[1].lower(), mask_url_secrets(f"{found[1]}://{found[2].lstrip('/')}"))
