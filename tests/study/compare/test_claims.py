"""Published claims, from a study file to their verdicts: lower, higher and the same, in arms, metrics and ladders."""

import pytest

from lightning_moevlm.study.report.result_records import make_records
from lightning_moevlm.study.report.sentences import describe_findings
from lightning_moevlm.study.report.tables.claims_table import claims_table
from lightning_moevlm.tracking.read.series import Series
from tests.study.compare.test_results import NOISE, to_result

ARMS = {"baseline": None, "fast": {"model.speed": 0.9}, "same": {"model.skew": 0.2}}
SHIFT = {"baseline": 0.0, "fast": -1.0, "same": 0.001}
NAMES = {"says": "As the paper says.", "arm": "fast"}


def verdicts_of(tmp_path, *claims, final=None, more=lambda run: {}, **study):
    study = {"arms": ARMS, "claims": [NAMES | claim for claim in claims]} | study

    def ended(run):
        return 5.0 + run.seed + SHIFT[run.arm] * (1 + NOISE[run.seed])

    result = to_result(tmp_path, study, final or ended, more=more)
    return result, [str(one.verdict) for one in result.claims]


def test_a_difference_decides_by_its_direction(tmp_path):
    _, verdicts = verdicts_of(
        tmp_path,
        {"expect": "lower"},
        {"expect": "higher"},
        {"arm": "baseline", "against": "fast", "expect": "higher"},
        {"expect": "same", "within": 0.1},
        {"arm": "same", "expect": "same", "within": 0.1},
        {"arm": "same", "expect": "same", "within": 0.0001},
    )
    assert verdicts == ["reproduced", "reversed", "reproduced", "reversed", "reproduced", "reversed"]


def test_what_chance_may_have_made_is_not_seen(tmp_path):
    ends = {"fast": (4.0, 6.2, 6.9), "baseline": (5.0, 6.0, 7.0), "same": (5.0, 6.1, 6.9)}
    result, verdicts = verdicts_of(
        tmp_path,
        {"expect": "lower"},
        {"expect": "higher"},
        {"arm": "same", "expect": "same", "within": 0.01},
        final=lambda run: ends[run.arm][run.seed],
    )
    assert verdicts == ["not seen"] * 3
    assert describe_findings(result)[0] == "Published claims: 3 not seen."


def test_holm_corrects_over_claims_and_leaves_controls_apart(tmp_path):
    # Differences -1, -1.2, -0.9: t = -11.7, p = 0.0072; times 8 it exceeds 0.05
    ends = {"fast": (4.0, 4.8, 6.1), "baseline": (5.0, 6.0, 7.0), "same": (5.1, 5.9, 7.0)}
    others = [{"arm": "same", "expect": "lower"}] * 7
    claims = [{"expect": "lower"}, *others, {"expect": "lower", "control": True}]
    final = lambda run: ends[run.arm][run.seed]  # noqa: E731
    result, verdicts = verdicts_of(tmp_path, *claims, final=final, decide={"correction": "holm"})
    assert (verdicts[0], verdicts[-1]) == ("not seen", "reproduced")
    assert result.claims[0].effect.p_adjusted == pytest.approx(8 * result.claims[-1].effect.p_adjusted)
    assert describe_findings(result)[:2] == ("Published claims: 8 not seen.", "Controls: 1 reproduced.")
    assert describe_findings(result)[2].endswith(
        "Note: its interval excludes 0, but p = 0.0576 over the study's comparisons."
    )
    _, verdicts = verdicts_of(tmp_path, *claims, final=final)
    assert verdicts[0] == "reproduced"


def test_two_metrics_of_one_arm_are_compared(tmp_path):
    def more(run):
        late = 0.6 + 0.01 * NOISE[run.seed]
        return {
            "dead_experts/block1/image": Series((4,), (late + 1,)),
            "dead_experts/block1/text": Series((4,), (1.0,)),
        }

    claim = {"metric": "dead_experts/block1/image", "against_metric": "dead_experts/block1/text", "expect": "higher"}
    result, verdicts = verdicts_of(tmp_path, claim | {"against": "fast"}, more=more)
    assert verdicts == ["reproduced"]
    assert result.claims[0].effect.centre == pytest.approx(0.6, abs=0.001)
    assert result.claims[0].claim.name == "fast: dead_experts/block1/image against dead_experts/block1/text"


def test_a_failed_run_counts_with_its_capped_value_in_the_primary_metric_alone(tmp_path):
    claims = (
        {"arm": "baseline", "against": "fast", "expect": "higher"},
        {"metric": "drop_rate/block1/text", "expect": "same", "within": 1.0},
    )
    final = lambda run: None if run.arm == "baseline" else 5.0 + 0.1 * NOISE[run.seed]  # noqa: E731
    result, verdicts = verdicts_of(tmp_path, *claims, final=final)
    assert verdicts == ["reproduced", "not run"]  # all of the baseline diverged, so no run of it has a drop rate
    assert result.claims[0].theirs.mean == pytest.approx(5.0002)
    assert result.claims[0].mine.mean == 7.0  # 9, capped at the untrained model's


def test_sensitivity_is_compared_between_ladders(tmp_path):
    arms = {"baseline": None} | {
        f"{name}_{rate}": {"model.skew": skew, "model.optimizer.init_args.lr": float(f"0.{rate}")}
        for name, skew in (("plain", 0.1), ("treated", 0.2))
        for rate in ("01", "1")
    }
    ends = {"baseline": 5.0, "plain_01": 4.0, "plain_1": 6.0, "treated_01": 4.0, "treated_1": 4.5}

    def final(run):
        return ends[run.arm] + (0.1 * NOISE[run.seed] if run.arm == "treated_1" else 0.0)

    claim = {"arm": "treated_1", "against": "plain_1", "metric": "learning_rate_sensitivity", "expect": "lower"}
    result, verdicts = verdicts_of(tmp_path, claim, final=final, arms=arms)
    assert verdicts == ["reproduced"]
    assert result.claims[0].theirs.mean == pytest.approx(1.0)  # (4 + 6) / 2 - 4
    assert result.claims[0].effect.centre == pytest.approx(-0.75, abs=0.01)


def test_the_report_shows_claims_first(tmp_path):
    result, _ = verdicts_of(
        tmp_path, {"expect": "lower"}, {"arm": "same", "expect": "same", "within": 0.1, "control": True}
    )
    table = claims_table(result)
    assert [(row[0], row[1], row[4], row[7]) for row in table.rows] == [
        ("claim 1", "val/task_loss", "lower", "reproduced"),
        ("control 1", "val/task_loss", "same within 0.1", "reproduced"),
    ]
    assert "claim 1: As the paper says." in table.notes
    assert describe_findings(result)[2].startswith(
        "claim 1, fast against baseline: reproduced. As the paper says. Here "
    )
    records = make_records(result)["claims"]
    assert [record["verdict"] for record in records] == ["reproduced", "reproduced"]
    assert records[0]["claim"]["says"] == "As the paper says."
    assert claims_table(to_result(tmp_path, {}, lambda run: 5.0)) is None
