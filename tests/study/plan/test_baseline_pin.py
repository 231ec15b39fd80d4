"""A study that pins its baseline: changes that move the digest, changes that do not, and the text of a refusal."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_moevlm.common.digest import digest_text
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.declare.study_file import read_study
from lightning_moevlm.study.plan.baseline_pin import baseline_digest, keep_baseline, refuse_other_baseline
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.plan.selection import select
from lightning_moevlm.study.report.tables.plan_tables import plan_table
from tests.study.tiny_study import plan_of, write_project


def planned(folder: Path, study: dict[str, object] | None = None, **model: object) -> Plan:
    return plan_of(write_project(folder, f"sqlite:///{folder / 'mlflow.db'}", study, model))


def test_the_digest_is_that_of_the_baseline_alone(tmp_path: Path) -> None:
    digest = baseline_digest(planned(tmp_path))
    assert digest is not None
    others = {"seeds": [5], "budget": {"max_steps": 9}, "arms": {"baseline": None, "skewed": {"model.skew": 0.9}}}
    assert baseline_digest(planned(tmp_path, others)) == digest  # seeds, length and other arms are the study's own
    assert baseline_digest(planned(tmp_path, speed=0.6)) != digest
    other = planned(tmp_path, {"arms": {"baseline": None, "fast": {"model.speed": 0.9}}, "baseline": "baseline"})
    assert baseline_digest(select(other, ["arm=fast"])) is None
    assert f"`baseline_digest: '{digest}'`" in " ".join(plan_table(other, dict.fromkeys(_folders(other), "")).notes)


def _folders(plan: Plan) -> list[str]:
    return [run.folder for run in plan.runs]


def test_a_changed_baseline_is_refused_with_the_known_changes(tmp_path: Path) -> None:
    before = planned(tmp_path)
    pinned = {"baseline_digest": baseline_digest(before)}
    refuse_other_baseline(planned(tmp_path, pinned))
    child = planned(tmp_path, pinned, speed=0.6, worse=1.0)
    now = baseline_digest(child)
    assert f"baseline: {now}, pinned." in plan_table(child, dict.fromkeys(_folders(child), "")).notes
    line = (tmp_path / "tiny.yaml").read_text().splitlines().index(f"baseline_digest: {_dumped(pinned)}") + 1
    with pytest.raises(UserError) as refused:
        refuse_other_baseline(child)
    told = str(refused.value)
    assert told.startswith(f"{tmp_path / 'tiny.yaml'}:{line}: baseline_digest is ")
    assert f"baseline_digest is {pinned['baseline_digest']}, but the baseline 'baseline' resolves to {now}" in told
    assert "Changed keys: unknown (no study below" in told
    assert f"To accept the change: `baseline_digest: '{now}'`" in told

    keep_baseline(before)  # as `sweep run` does
    with pytest.raises(UserError, match=r"model.speed was 0.5, is 0.6; model.worse was 0.0, is 1.0. To accept"):
        refuse_other_baseline(child)
    [kept] = before.folder.glob("baselines/*.json")
    kept.write_text(kept.read_text().replace('"0.5"', '"0.4"'))  # it is no longer what its name says
    with pytest.raises(UserError, match=r"Changed keys: unknown \(no study below"):
        refuse_other_baseline(child)


def test_an_option_that_is_off_leaves_the_baseline_as_it_was(tmp_path: Path) -> None:
    before = planned(tmp_path)
    digest = baseline_digest(before)
    assert baseline_digest(planned(tmp_path, router_z=None, parts=[{"weight": 1.0, "ramp": None}])) == baseline_digest(
        planned(tmp_path, parts=[{"weight": 1.0}])
    )
    assert baseline_digest(planned(tmp_path, router_z=None)) == digest
    assert baseline_digest(planned(tmp_path, router_z="null")) != digest  # a text
    on = planned(tmp_path, {"baseline_digest": digest}, router_z=0.1)
    keep_baseline(before)
    with pytest.raises(UserError, match=r"Changed keys: model.router_z was unset, is 0.1. To accept"):
        refuse_other_baseline(on)


def test_a_pin_that_counted_nulls_is_refused_once_with_the_reason(tmp_path: Path) -> None:
    now = planned(tmp_path)
    keep_baseline(now)
    [kept] = now.folder.glob("baselines/*.json")
    leaves = json.loads(kept.read_text()) | {"model.router_z": "null"}
    old = digest_text(json.dumps(leaves, sort_keys=True))
    kept.with_name(f"{old}.json").write_text(json.dumps(leaves))
    with pytest.raises(UserError, match="Changed keys: none; the pin counted keys that are null"):
        refuse_other_baseline(planned(tmp_path, {"baseline_digest": old}))


def _dumped(pinned: dict[str, str | None]) -> str:
    return yaml.safe_dump(pinned).partition(": ")[2].strip()


def test_digests_that_look_like_numbers_are_read_as_written(tmp_path: Path) -> None:
    file = write_project(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    text = file.read_text()
    for digest in ("123456789012", "12345678e012", "'012345678901'"):
        file.write_text(f"{text}baseline_digest: {digest}\n")
        pin = read_study(file).pin
        assert pin is not None
        assert pin.digest == digest.strip("'")
    for wrong in ("3f2a", "3F2A81C09D4E", "[a]", "true"):
        file.write_text(f"{text}baseline_digest: {wrong}\n")
        with pytest.raises(UserError, match=r"baseline_digest: expected the 12 hex digits"):
            read_study(file)
