"""The extra `hf` on the path makes nothing slower that does not use it."""

import importlib.util
import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

EXTRA = ("transformers", "peft", "accelerate")
PROBE = f"""
import sys

def imported():
    return {{name for name in sys.modules if name.partition(".")[0] in {EXTRA}}}

import lightning_moevlm, lightning_moevlm.cli.main, lightning_moevlm.cli.run_command, lightning_moevlm.model.backbones
print("torch" in sys.modules, imported())
import lightning.pytorch
before = imported()  # torchmetrics, which Lightning imports, takes two names of transformers
import lightning_moevlm.cli.training
print(imported() - before, {{name.partition(".")[0] for name in before}} - {{"transformers"}})
"""


def test_backbones_and_the_command_line_start_without_the_extra() -> None:
    assert all(importlib.util.find_spec(name) for name in EXTRA)
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split("\n") == ["True set()", "set() set()", ""]
