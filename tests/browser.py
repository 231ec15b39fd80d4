"""A real browser without a window, which opens pages of servers on loopback."""

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium and no google-chrome on this machine")


def open_page(address: str, profile: Path, milliseconds: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Return the page's elements on standard output once it is at rest, and its console on standard error.

    profile: a folder that does not exist yet. milliseconds: of the page's own clock, which stands still while it waits.
    """
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", "--enable-logging=stderr", f"--virtual-time-budget={milliseconds}"]
    command += [*options, "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
