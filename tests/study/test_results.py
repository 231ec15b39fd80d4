"""From planned runs and what they logged to effects of factors, ladders and guards, through real study files."""

import pytest
import yaml

from lightning_moevlm.study.gather import compare
from lightning_moevlm.study.gather import result_of as result_of_run
from lightning_moevlm.study.ledger import RunState, Status
from lightning_moevlm.study.result_records import factor_records, ladder_records
from lightning_moevlm.study.tables import report_tables
from lightning_moevlm.study.verdict import Verdict
from lightning_moevlm.tracking.series import Series
from tests.study.tiny_study import plan_of, write_project

FACTORS = {
    "skew": {"on": {"model.skew": 0.9}},
    "speed": {"on": {"model.speed": 0.9}},
}
NOISE = {0: 0.010, 1: -0.012, 2: 0.008}


def result_of(tmp_path, study, finals, drop=lambda run: 0.1):
    """Compare runs that ended at finals(run), diverged where that is None."""
    file = write_project(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}", {"seeds": [0, 1, 2]} | study)
    written = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({key: value for key, value in written.items() if value is not None}))
    plan = plan_of(file)
    results = []
    for run in plan.runs:
        final = finals(run)
        series = {
            "val/task_loss": Series((0, 4), (7.0, 9.0 if final is None else final)),
            "drop_rate/block1/text": Series((4,), (drop(run),)),
        }
        state = RunState(Status.DIVERGED if final is None else Status.FINISHED, run_id=run.name)
        results.append(result_of_run(run, state, series))
    return compare(plan.comparison, plan.cards, results)


def test_factors_of_a_designed_study(tmp_path):
    def final(run):
        model = run.resolved["model"]
        fast, skewed = model["speed"] == 0.9, model["skew"] == 0.9
        return 5.0 + run.seed - (2.0 + NOISE[run.seed]) * fast - NOISE[run.seed] * skewed

    result = result_of(tmp_path, {"arms": None, "factors": FACTORS, "design": "factorial"}, final)
    effects = {one.name: one.effect for one in result.factors}
    assert list(effects) == ["skew", "speed", "skew x speed"]
    assert effects["speed"].differences == pytest.approx((-2.010, -1.988, -2.008))
    assert effects["speed"].verdict is Verdict.HELPS
    assert effects["skew"].verdict is Verdict.INCONCLUSIVE
    assert effects["skew x speed"].differences == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    table = next(table for table in report_tables(result) if table.title.startswith("Main effects"))
    assert [row[0] for row in table.rows] == ["skew", "speed", "skew x speed"]
    assert [record.factors for record in factor_records(result)] == [["skew"], ["speed"], ["skew", "speed"]]


def test_learning_rates_of_a_study(tmp_path):
    rates = {"baseline": None} | {f"lr_{rate}": {"model.optimizer.init_args.lr": rate} for rate in (0.01, 0.1, 1.0)}
    ends = {"lr_0.01": 5.0, "lr_0.1": 4.0, "lr_1.0": None, "baseline": 5.0}
    names = {name.replace(".", "_"): end for name, end in ends.items()}
    arms = {name.replace(".", "_"): changes for name, changes in rates.items()}
    result = result_of(tmp_path, {"arms": arms}, lambda run: names[run.arm])
    [ladder] = result.ladders  # the baseline has no learning rate of its own
    # Untrained 7: (5 + 4 + 7) / 3 - 4 = 4/3 in every seed.
    assert ladder.sensitivity.mean == pytest.approx(4 / 3)
    assert ladder.largest_stable == 0.1
    assert [(record.learning_rate, record.stable, record.total) for record in ladder_records(result)] == [
        (0.01, 3, 3),
        (0.1, 3, 3),
        (1.0, 0, 3),
    ]
    assert any(table.title == "Sensitivity to the learning rate" for table in report_tables(result))


def test_guard_correction_and_margin_of_the_study_file(tmp_path):
    study = {
        "arms": {"baseline": None, "fast": {"model.speed": 0.9}, "same": {"model.skew": 0.2}},
        "decide": {"correction": "holm", "within": 0.2},
        "guard": [{"metric": "drop_rate/block1/text", "at_most": 0.05}],
    }
    shift = {"baseline": 0.0, "fast": -1.0, "same": 1.0e-3}

    def final(run):
        return 5.0 + run.seed + shift[run.arm] * (1 + NOISE[run.seed])

    result = result_of(tmp_path, study, final, lambda run: 0.3 if run.arm == "fast" else 0.1)
    words = {arm.arm.name: arm.effect.word for arm in result.arms if arm.effect}
    assert words == {"fast": "breaks guard", "same": "no difference within 0.2"}
    [guard] = result.arms[1].effect.guards
    assert guard.worse == pytest.approx(0.2)
    effects = report_tables(result)[0]
    assert "p (Holm)" in effects.columns
    assert any("may get worse by at most 0.05" in note for note in effects.notes)
    assert any("±0.2" in note for note in effects.notes)
