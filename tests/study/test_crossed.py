"""Studies that cross factors answer by factor first: in sentences, tables, figures and records."""

import pytest
import yaml
from rich.console import Console

from lightning_moevlm.study.report.figures import draw_all
from lightning_moevlm.study.report.make_report import print_answer
from lightning_moevlm.study.report.result_records import make_records
from lightning_moevlm.study.report.sentences import count_verdicts, describe_findings
from lightning_moevlm.study.report.tables.report_tables import report_tables
from lightning_moevlm.study.statistics.verdict import Verdict
from tests.study.compare.test_results import NOISE, to_result
from tests.study.tiny_study import plan_of, write_project

LEVELS = {
    "speed": {"levels": {"slow": {}, "mid": {"model.speed": 0.7}, "fast": {"model.speed": 0.9}}},
    "skew": {"on": {"model.skew": 0.9}},
}
KEYS = ("skew", "speed", "worse", "seconds_per_step", "validate_every")


def crossed(tmp_path, factors, design, end):
    """Of runs whose losses end at 5 + seed + end(levels, noise of the seed)."""
    study = {"arms": None, "factors": factors, "design": design}
    file = write_project(tmp_path, "sqlite://", study)
    written = yaml.safe_load(file.read_text())
    kept = {key: value for key, value in written.items() if value is not None}
    file.write_text(yaml.safe_dump(kept, sort_keys=False))
    arms = {arm.name: {here.factor: here.level for here in arm.levels} for arm in plan_of(file).comparison.arms}
    return to_result(tmp_path, study, lambda run: 5.0 + run.seed + end(arms[run.arm], NOISE[run.seed]))


def starts(sentences):
    return [sentence.partition(":")[0] for sentence in sentences]


def test_a_grid_answers_by_factor(tmp_path):
    def end(levels, noise):
        fast, skewed = levels["speed"] == "fast", levels["skew"] == "on"
        return -(levels["speed"] == "mid") - (3.0 + noise) * fast + skewed * (0.5 + noise) + fast * skewed

    result = crossed(tmp_path, LEVELS, "grid", end)
    effects = {one.name: one.effect for one in result.factors}
    assert list(effects) == ["speed mid", "speed fast", "skew", "speed mid x skew", "speed fast x skew"]
    # fast against slow: -(3 + n) without skew, -(3 + n) + 1 with it
    assert effects["speed fast"].differences == pytest.approx([-2.5 - NOISE[s] for s in range(3)])
    assert effects["speed mid"].differences == pytest.approx([-1.0] * 3)
    # skew: 0.5 + n at slow and at mid, 1.5 + n at fast
    assert effects["skew"].differences == pytest.approx([0.5 + NOISE[s] + 1 / 3 for s in range(3)])
    assert effects["speed fast x skew"].differences == pytest.approx([1.0] * 3)
    assert effects["speed mid x skew"].differences == pytest.approx([0.0] * 3, abs=1e-12)
    assert effects["speed fast"].verdict is Verdict.HELPS

    first = report_tables(result)[0]
    assert first.title.startswith("Main effects")
    assert [row[0] for row in first.rows] == list(effects)
    told = describe_findings(result)
    assert starts(told) == list(effects)
    assert "speed fast: helps. Compared with speed slow, validation task loss changed by -2.50" in told[1]
    assert "skew: hurts. Turning it on changed validation task loss by +0.83" in told[2]
    assert "skew changed the effect of speed fast on validation task loss by" in told[4]
    record = make_records(result)["factors"][1]
    assert record["contrasts"] == [{"factor": "speed", "level": "fast", "other": "slow"}]
    figure, matrix, *_ = draw_all(result)
    assert [row[0] for row in figure.table.rows] == list(effects)
    assert (figure.name, matrix.name) == ("factors", "interactions")


@pytest.mark.parametrize("kind", ["product", "size_ladder", "lr_sensitivity"])
def test_every_design_that_crosses_factors_answers_by_factor(tmp_path, kind):
    sizes = {"levels": {"small": {}, "large": {"model.validate_every": 2}}}
    factors = {"a": {"on": {"model.skew": 0.9}}, "b": {"on": {"model.speed": 0.9}}}
    if kind == "product":
        factors["size"] = sizes
        options = [{"leave_one_out": {"factors": ["a", "b"]}}, {"grid": {"factors": ["size"]}}]
    else:
        options = sizes if kind == "size_ladder" else {"rates": [0.1, 0.2]}

    def end(levels, noise):
        return -(1.0 + noise) * (levels["a"] == "on") + 0.25 * (levels["a"] == levels["b"] == "on")

    result = crossed(tmp_path, factors, {kind: options}, end)
    effects = {one.name: one.effect for one in result.factors}
    # left out one at a time, b is on where a is off; crossed, it is on in half of the arms
    with_b = 0.25 if kind == "product" else 0.125
    assert effects["a"].differences == pytest.approx([with_b - 1.0 - NOISE[s] for s in range(3)])
    assert describe_findings(result)[0].startswith("a: helps.")
    third = {"product": "size large", "size_ladder": "size large", "lr_sensitivity": "lr 2e_1"}[kind]
    pairs = [f"a x {third}", f"b x {third}"]
    assert list(effects) == ["a", "b", third, *(pairs if kind == "product" else ["a x b", *pairs])]


def test_a_design_that_crosses_nothing_answers_by_arm(tmp_path):
    result = crossed(tmp_path, LEVELS, "one_in", lambda levels, noise: -noise)
    assert result.factors == ()
    assert starts(describe_findings(result)) == ["speed_mid", "speed_fast", "skew"]


def test_many_undecided_interactions_are_counted(tmp_path):
    factors = {name: {"on": {f"model.{key}": 3}} for name, key in zip("abcde", KEYS, strict=True)}

    def end(levels, noise):
        return -(1 + noise) * (levels["a"] == "on") - (1 + noise) * (levels["b"] == levels["c"] == "on")

    result = crossed(tmp_path, factors, "factorial", end)
    assert starts(describe_findings(result)) == [*"abcde", "b x c", "9 of 10 interactions of two factors"]
    assert count_verdicts(result) == "15 main effects and interactions: helps 4, inconclusive 11."


def test_the_terminal_answers_first_and_shortly(tmp_path):
    result = crossed(tmp_path, LEVELS, "grid", lambda levels, noise: -(1 + noise) * (levels["skew"] == "on"))

    def shown(full):
        console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
        print_answer(console, result, full)
        return [line.rstrip() for line in console.export_text().splitlines()]

    short, full = shown(full=False), shown(full=True)
    assert short[0] == "Finding: Does a faster model learn faster?"
    assert short[3].startswith("  skew: helps. ")
    assert len(short) < 30 < len(full)
    titles = [table.title for table in report_tables(result)]
    assert [title for title in titles if title in short] == titles[:1]
    assert [title for title in titles if title in full] == titles
