"""Run by test_resume.py on two ranks: each resumes amid steps and compares with its own run without interruption."""

import json
import sys
from pathlib import Path

from tests.training.checkpoints.test_resume import Runs, remembering_module


def main(shards: Path, folder: Path, found: Path) -> None:
    moments = Runs(shards, 2, 4, module=remembering_module, ranks=2).resume_from_everywhere(folder)
    found.write_text(json.dumps(sorted(moments)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
