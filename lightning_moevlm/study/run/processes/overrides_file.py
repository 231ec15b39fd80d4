"""Writes the overrides of a run as a YAML file that the command line reads."""

from pathlib import Path

import yaml

from lightning_moevlm.common.atomic_files import write_atomically
from lightning_moevlm.study.plan.planned_run import PlannedRun

OVERRIDES_FILE = "overrides.yaml"
_TEXT = "tag:yaml.org,2002:str"


class _QuotingDumper(yaml.SafeDumper):
    """YAML with every text in quotes: unquoted, the digest 632471343e91 is a number to the command line's parser."""


_QuotingDumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(_TEXT, text, style='"'))


def write_overrides(run: PlannedRun, folder: Path) -> Path:
    """Write the overrides of a run so that the command line reads them back unchanged; return the file."""
    file = folder / OVERRIDES_FILE
    write_atomically(file, yaml.dump(run.overrides, Dumper=_QuotingDumper, sort_keys=False, width=10_000))
    return file
