"""The number that makes an arm cost as much as the baseline: found by hand, written into the plan, or refused."""

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.compare.collect_results import compare_arms
from lightning_moevlm.study.declare.study_file import read_study
from lightning_moevlm.study.plan.plan_study import plan_study
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.report.plan_records import plan_records
from lightning_moevlm.study.report.result_records import make_records
from lightning_moevlm.study.report.tables.effect_tables import models_table
from lightning_moevlm.study.report.tables.plan_tables import arms_table
from tests.study.tiny_study import Card, resolve, write_project

BASE = {"width": 100, "depth": 2, "part": {"class_path": "Part", "init_args": {"hidden": 7, "name": "a"}}}
TOLD = "wide: model.width = 248 was solved, a multiple of 8. It reaches 0.9920 times the active FLOPs of baseline."


def describe(resolved: dict[str, Any]) -> Card:
    """FLOPs: 30 of each unit at the usual speed of 0.5, 12 of each at 0.9, and 1 of each hidden one; 3,007 at first."""
    model = resolved["model"]
    if model["width"] % 4:
        raise UserError(f"width {model['width']} is not a multiple of 4")
    each = 30 if model["speed"] == 0.5 else 12
    return Card(1, 1, each * model["width"] + model["part"]["init_args"]["hidden"])


def spell_out(files: list[Path], overrides: dict[str, Any]) -> dict[str, Any]:
    """Resolve as the parser does: a class by its name alone, and options without `init_args`."""
    overrides = copy.deepcopy(overrides)
    part = overrides.get("model", {}).get("part", {})
    if isinstance(part, str):
        overrides["model"]["part"] = {"class_path": part}
    elif "class_path" not in part and "init_args" not in part:
        overrides.setdefault("model", {})["part"] = {"init_args": part}
    return resolve(files, overrides)


def plan(folder: Path, more: Mapping[str, Any] = MappingProxyType({}), **arm: Any) -> Plan:
    study = {"match": "active_flops", "arms": {"baseline": None, "wide": {"model.speed": 0.9} | arm}, **more}
    file = write_project(folder, f"sqlite:///{folder}/mlflow.db", study, BASE)
    return plan_study(read_study(file), spell_out, describe, folder / "sweeps")


def test_the_nearest_multiple_by_hand(tmp_path: Path) -> None:
    # the baseline has 30 x 100 + 7 = 3,007; 12 x 248 + 7 = 2,983 is nearest among 240, 248 and 256
    planned = plan(tmp_path, solve={"key": "model.width"})
    runs = [run for run in planned.runs if run.arm == "wide"]
    assert [run.resolved["model"]["width"] for run in runs] == [248, 248]
    assert [run.overrides["model"]["width"] for run in runs] == [248, 248]
    written = plan(tmp_path, **{"model.width": 248})
    assert [run.digest for run in planned.runs] == [run.digest for run in written.runs]
    finer = plan(tmp_path, solve={"key": "model.width", "multiple_of": 2 * 2})
    assert finer.runs[-1].resolved["model"]["width"] == 248  # 252 is 24 too many, and 248 is 24 too few


@pytest.mark.parametrize("key", ["model.part.init_args.hidden", "model.part.hidden"])
@pytest.mark.parametrize(
    ("change", "written"),
    [
        ({}, {"hidden": 1810}),
        ({"model.part.name": "b"}, {"name": "b", "hidden": 1810}),
        ({"model.part.init_args.name": "b"}, {"init_args": {"name": "b", "hidden": 1810}}),
        ({"model.part": "Other"}, {"class_path": "Other", "init_args": {"hidden": 1810}}),
        ({"model.part": {"class_path": "Other"}}, {"class_path": "Other", "init_args": {"hidden": 1810}}),
    ],
)
def test_the_number_is_written_as_the_arm_spells_its_keys(
    tmp_path: Path, key: str, change: dict[str, Any], written: dict[str, Any]
) -> None:
    # 12 x 100 + 1,810 = 3,010 is nearest to 3,007 among the tens
    planned = plan(tmp_path, solve={"key": key, "multiple_of": 10}, **change)
    assert planned.comparison.arms[1].changes == {"model": {"speed": 0.9, "part": written}}


def test_the_number_is_written_as_all_arms_spell_their_keys(tmp_path: Path) -> None:
    more = {"all_arms": {"model.part.init_args.name": "b"}}
    planned = plan(tmp_path, more, solve={"key": "model.part.hidden", "multiple_of": 10})
    assert planned.comparison.arms[1].changes == {"model": {"speed": 0.9, "part": {"init_args": {"hidden": 1810}}}}


def test_plan_and_report_show_what_was_solved(tmp_path: Path) -> None:
    planned = plan(tmp_path, solve={"key": "model.width"})
    assert TOLD in arms_table(planned).notes
    records = plan_records(planned, {run.folder: "planned" for run in planned.runs})
    expected = {"key": "model.width", "number": 248, "multiple_of": 8, "ratio": 2983 / 3007}
    assert [record["solved"] for record in records] == [None, None, expected, expected]
    assert records[-1]["changes"] == {"model.speed": 0.9, "model.width": 248}
    result = compare_arms(planned.comparison, planned.cards, [])
    assert TOLD in models_table(result).notes
    assert [record["solved"] for record in make_records(result)["arms"]] == [None, expected]


@pytest.mark.parametrize(
    ("solve", "told"),
    [
        ({"key": "model.width", "multiple_of": 100}, r"the nearest, 200, has 0\.800 times as many\. Choose a smaller"),
        ({"key": "model.width", "multiple_of": 3}, r"tried model\.width = 3, which was refused \(width 3 is not"),
        ({"key": "model.depth"}, r"model\.depth does not change the arm's active FLOPs; solve another key"),
        ({"key": "model.widht"}, r"model\.widht is not an option in this arm; give the key of an option"),
        ({"key": "model.part.name"}, r"model\.part\.name is 'a' in this arm; give the key"),
        ({"key": "model.speed"}, r"solve\.key: the arm sets 'model\.speed' in line \d+; remove it, or do not solve it"),
        ({"ky": "model.width"}, r"unknown key 'ky'; did you mean 'key'"),
        ({"key": "model.width", "multiple_of": 0}, r"multiple_of: expected a whole number >= 1"),
    ],
)
def test_what_cannot_be_solved_is_refused(tmp_path: Path, solve: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=rf"tiny\.yaml:\d+: .*{told}"):
        plan(tmp_path, solve=solve)


@pytest.mark.parametrize(
    ("study", "told"),
    [
        ({"match": None}, "nothing says what to match; add `match: active_flops`"),
        ({"baseline": "wide"}, "the baseline is what the others are matched with"),
        (
            {"arms": None, "design": "one_in", "factors": {"wide": {"on": {"solve": {"key": "model.width"}}}}},
            "`solve` belongs to an arm of `arms`",
        ),
    ],
)
def test_places_of_solve(tmp_path: Path, study: dict[str, Any], told: str) -> None:
    arms = {"arms": {"baseline": None, "wide": {"solve": {"key": "model.width"}}}, "match": "active_flops"}
    changes = {key: value for key, value in (arms | study).items() if value is not None}
    file = write_project(tmp_path, "", changes, BASE)
    if study.get("arms", 0) is None:
        text = file.read_text()
        file.write_text(text.replace(text[text.index("arms:") : text.index("seeds:")], ""))
    with pytest.raises(UserError, match=told):
        read_study(file)
