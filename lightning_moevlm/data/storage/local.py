"""Refuses addresses where only local folders and files work, with a command that copies them."""

import re
from pathlib import Path

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import mask_url_secrets

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(.*)")
_COPIES = {"s3": "aws s3 sync {address} FOLDER", "gs": "gsutil -m rsync -r {address} FOLDER"}


def local_source(text: str, option: str) -> Path:
    """Return the path of an input.

    Raises:
        UserError: if it is an address, with a command that copies it.
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


def local_target(text: str) -> Path:
    """Return the path of an output.

    Raises:
        UserError: if it is an address.
    """
    address = _address(text)
    if address is not None or text.startswith("pipe:"):
        shown = text if address is None else address[1]
        raise UserError(f"--out {shown} is an address, but outputs are written to local folders only; give a path")
    return Path(text)


def _address(text: str) -> tuple[str, str] | None:
    """Return an address's scheme and itself, without secrets; `Path` may have removed one of its slashes."""
    found = _ADDRESS.fullmatch(text)
    return None if found is None else (found[1].lower(), mask_url_secrets(f"{found[1]}://{found[2].lstrip('/')}"))
