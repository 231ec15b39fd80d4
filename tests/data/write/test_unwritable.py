"""Targets that cannot be written: one line and exit code 2 from every command that writes beside `convert`."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "command",
    [
        ("check", "SET", "--json", "FILE/card.json"),
        ("show", "SET", "--out", "FILE/page.html"),
        ("build", "scenes", "--num_samples", "40", "--out", "FILE/scenes"),
    ],
)
def test_a_target_below_a_file_is_refused_in_one_line(
    workplace: Path, moevlm: Callable[..., str], scenes_root: Path, command: tuple[str, ...]
) -> None:
    (workplace / "FILE").write_text("no folder")
    printed = moevlm("data", *(part.replace("SET", str(scenes_root)) for part in command), code=2)
    assert "FILE" in printed and "could not be written" in printed and "Traceback" not in printed
    assert (workplace / "FILE").read_text() == "no folder"
