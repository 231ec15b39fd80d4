"""Writes the overrides of a run as a YAML file that the command line reads."""

from pathlib import Path

import yaml

from lightning_moevlm.common.atomic_files import write_atomically
from lightning_moevlm.study.plan.planned_run import PlannedRun

OVERRIDES_FILE = "overrides.yaml"


class QuotingDumper(yaml.SafeDumper):
    """YAML with every text in quotes: unquoted, the digest 632471343e91 is a number to the command line's parser."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Quote the text."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"')


def write_overrides(run: PlannedRun, folder: Path) -> Path:
    """Write what goes over the base, as the command line reads it back unchanged; return the file."""
    file = folder / OVERRIDES_FILE
    write_atomically(file, yaml.dump(run.overrides, Dumper=QuotingDumper, sort_keys=False, width=10_000))
    return file
