"""The base of a run is resolved once by a process and its forks, and again where its file has changed."""

import os
from pathlib import Path

import pytest
import torch
import yaml

from lightning_moevlm.cli import fork_server, training
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking.record import base_config, provenance
from tests.cli.small_study import SMALL


@pytest.fixture
def words(workplace: Path) -> list[str]:
    base = yaml.safe_load((workplace / "conf/quickstart.yaml").read_text())
    base.setdefault("trainer", {})["callbacks"] = "part.yaml"
    (workplace / "base.yaml").write_text(yaml.safe_dump(base))
    (workplace / "part.yaml").write_text("- class_path: lightning_moevlm.training.callbacks.Telemetry")
    (workplace / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return ["fit", "-c", "base.yaml", "-c", "small.yaml", "--trainer.max_steps=2"]


def test_a_rehearsal_resolves_the_base_for_the_runs_to_come(words: list[str], workplace: Path) -> None:
    training.rehearse(words)
    before = base_config._resolved_alone.cache_info()
    training.run([*words, "--trainer.default_root_dir=runs"])
    after = base_config._resolved_alone.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)
    text = (workplace / "base.yaml").read_text()
    (workplace / "base.yaml").write_text(text + "\n# changed\n")
    training.rehearse(words)
    assert base_config._resolved_alone.cache_info().misses == after.misses + 1
    (workplace / "part.yaml").write_text("- class_path: lightning_moevlm.training.callbacks.Liveness")
    training.rehearse(words)
    assert base_config._resolved_alone.cache_info().misses == after.misses + 2


def test_a_rehearsal_leaves_nothing_behind(words: list[str], workplace: Path) -> None:
    files, environment, state = sorted(workplace.rglob("*")), dict(os.environ), torch.get_rng_state()
    training.rehearse([*words, "--seed_everything=7"])
    assert sorted(workplace.rglob("*")) == files
    assert dict(os.environ) == environment  # Lightning keeps the seed there, and a run with `true` would take it
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match="max_stepz"):
        training.rehearse([*words, "--trainer.max_stepz=2"])


def test_a_rehearsal_notes_the_code_for_the_runs_to_come(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They train with what it has imported; a commit made since tells of other code."""
    provenance.code_checkout.cache_clear()
    training.rehearse(words)
    edited = provenance.Checkout("made since", dirty=True)
    monkeypatch.setattr(provenance, "checkout_of", lambda directory: edited)
    assert provenance.code_checkout() != edited


def test_a_broken_package_of_a_store_keeps_nobody_from_forking(
    words: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "adlfs.py").write_text("from nowhere import nothing")
    monkeypatch.syspath_prepend(workplace)
    fork_server.prepare(words)
