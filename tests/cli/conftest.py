"""A study in a workplace."""

from pathlib import Path

import pytest
import yaml

from tests.cli.small_study import SMALL, STUDY, Study


@pytest.fixture
def study(workplace: Path) -> Study:
    """Write a study (with changes) into the workplace and return its name."""
    (workplace / "small.yaml").write_text(yaml.safe_dump(SMALL))

    def write(**changes: object) -> str:
        (workplace / "line.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
        return "line.yaml"

    return write
