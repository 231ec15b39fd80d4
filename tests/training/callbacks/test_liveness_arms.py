"""No false alarm: every arm of the shipped studies passes its first step with its switches asked for their proofs.

The shipped configurations and every router do so in tests/test_conf.py, whose runs have the default callbacks.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_moevlm.configuration.resolver import ConfigResolver, describe_model
from lightning_moevlm.study.declare.study_file import read_study
from lightning_moevlm.study.plan.plan_study import plan_study
from tests.conftest import PROJECT

STUDIES = sorted(path.stem for path in (PROJECT / "ablations").glob("*.yaml"))


@pytest.fixture(scope="module")
def resolver() -> ConfigResolver:
    return ConfigResolver()


@pytest.fixture(scope="module")
def asked() -> set[str]:
    """The models of earlier arms, as JSON."""
    return set()


def make_sets_of_tasks(moevlm: Callable[..., str], scenes_root: Path) -> None:
    """What conf/overlays/scenes_20k.yaml names, of few scenes."""
    scenes = Path("data/shards/scenes-20k")
    scenes.symlink_to(scenes_root, target_is_directory=True)
    for kind in ("questions", "statements"):
        moevlm("data", "convert", kind, str(scenes), "--licence", "CC0", "--out", f"{scenes}-{kind}")
    moevlm("data", "answers", f"{scenes}-questions")


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_every_arm_passes(
    study: str, resolver: ConfigResolver, asked: set[str], moevlm: Callable[..., str], scenes_root: Path, tmp_path: Path
) -> None:
    if study.startswith("adopted"):
        pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")
    declared = read_study(Path(f"ablations/{study}.yaml"))
    has_tasks = any(file.stem in ("scenes_20k", "questions") for file in declared.base)
    if has_tasks:
        make_sets_of_tasks(moevlm, scenes_root)
    data = ["--data.batch_size=12"] if has_tasks else [f"--data.root={scenes_root}", "--data.batch_size=4"]
    one_seed = replace(declared.comparison, seeds=declared.comparison.seeds[:1])
    plan = plan_study(replace(declared, comparison=one_seed), resolver, describe_model)
    for run in plan.runs:
        assert "lightning_moevlm.training.callbacks.Liveness" in str(run.resolved["trainer"])
        model = {part: options for part, options in run.resolved["model"].items() if part != "schedule"}
        model["optimizer"] = model["optimizer"]["class_path"]  # rungs of a ladder have the same switches
        if (told := json.dumps(model, sort_keys=True)) in asked:
            continue
        asked.add(told)
        config = tmp_path / "arm.json"
        config.write_text(json.dumps(run.resolved), encoding="utf-8")
        moevlm("fit", "-c", str(config), "--trainer.fast_dev_run=true", *data, "--data.num_workers=0")
