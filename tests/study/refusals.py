"""Asserts that a study file is refused: in one line that begins with file and line, and says how to change it."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.declare.study_file import read_study


def assert_refused(file: Path, line: int, words: Sequence[str]) -> None:
    """Read the file; the refusal must name that line and hold all words."""
    with pytest.raises(UserError) as refusal:
        read_study(file)
    message = str(refusal.value)
    assert "\n" not in message
    found = re.match(re.escape(str(file)) + r":(\d+): ", message)
    assert found, message
    assert int(found[1]) == line, message
    for word in words:
        assert word in message, message
