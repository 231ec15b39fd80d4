"""From a real sweep to tables, figures, one self-contained page and the summary run."""

import base64
import dataclasses
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from lightning_moevlm.study.compare.collect_results import collect_results
from lightning_moevlm.study.compare.results import StudyResult
from lightning_moevlm.study.report.figures import curves, draw_all, expert_load
from lightning_moevlm.study.report.figures.expert_load import read_loads
from lightning_moevlm.study.report.figures.report_figure import choose_looks
from lightning_moevlm.study.report.make_report import Report, describe_origin, make_report
from lightning_moevlm.study.report.mlflow_summary import log_summary
from lightning_moevlm.study.report.result_records import make_records
from lightning_moevlm.study.report.sentences import describe_arm
from lightning_moevlm.study.report.tables.report_tables import report_tables
from lightning_moevlm.study.report.tables.table import format_count
from lightning_moevlm.study.report.terminal import print_tables
from lightning_moevlm.study.report.write_report import write_report
from lightning_moevlm.study.run.ledger import read_ledger
from lightning_moevlm.study.statistics.verdict import Verdict
from lightning_moevlm.tracking.read.runs import find_runs
from lightning_moevlm.tracking.read.series import Series
from tests.study.tiny_study import sweep, write_project

ARMS = {
    "baseline": {"description": "Everything on."},
    "slow": {"description": "Learns <slowly>.", "model.speed": 0.2, "model.skew": 0.5},
    "explode": {"model.nan_at": 3},
    "crash": {"model.crash_at": 1},
}
FIGURES = ["effects", "curves", "accuracy", "expert_load", "expert_flow", "pareto", "throughput"]


@pytest.fixture(scope="module")
def swept(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory):
    """One real sweep of four arms and three seeds; one arm diverges, one crashes."""
    folder = tmp_path_factory.mktemp("swept")
    shutil.copyfile(migrated_database, folder / "mlflow.db")
    study = {"arms": ARMS, "seeds": [0, 1, 2], "also": ["throughput/samples_per_second"], "hypothesis": "Slow & worse."}
    plan, experiment, tally, _ = sweep(write_project(folder, f"sqlite:///{folder / 'mlflow.db'}", study))
    assert (tally.started, tally.stopped) == (12, "")  # a signal meant for the tests stops the sweep, not them
    return plan, experiment


@pytest.fixture(scope="module")
def result(swept) -> StudyResult:
    plan, experiment = swept
    return collect_results(plan, read_ledger(plan), experiment.uri)


@pytest.fixture(scope="module")
def report(swept, result) -> Report:
    plan, _ = swept
    return make_report(describe_origin(plan, result), result)


def expected_loss(step: int, seed: int, speed: float) -> float:
    """The formula of tiny_training.py, written again."""
    return 4 + 3 * math.exp(-speed * step) + 0.3 * seed + 0.01 * math.sin(7 * seed + 11 * speed)


def test_numbers_of_the_arms(result):
    baseline, slow, explode, crash = result.arms
    finals = [expected_loss(4, seed, 0.5) for seed in range(3)]
    assert baseline.final.mean == pytest.approx(sum(finals) / 3)
    assert baseline.untrained.mean == pytest.approx(sum(expected_loss(0, s, 0.5) for s in range(3)) / 3)
    assert (baseline.learned, baseline.finished, baseline.planned) == (3, 3, 3)
    assert baseline.effect is None
    assert baseline.accuracy["text"].mean == pytest.approx(0.5 - 0.4 * math.exp(-2) + 0.01)
    assert baseline.majority["text"].mean == pytest.approx(0.14)
    assert baseline.samples_per_second.mean == pytest.approx(100 + 5 + 10)
    assert baseline.also["throughput/samples_per_second"].deviation == pytest.approx(5)

    differences = [expected_loss(4, s, 0.2) - expected_loss(4, s, 0.5) for s in range(3)]
    assert slow.effect.differences == pytest.approx(differences)
    assert slow.verdict is Verdict.HURTS
    assert (explode.diverged, explode.finished, explode.final) == (3, 0, None)
    # Each diverged run counts as its untrained model.
    untrained = [expected_loss(0, seed, 0.5) - finals[seed] for seed in range(3)]
    assert explode.effect.differences == pytest.approx(untrained)
    assert explode.effect.verdict is (Verdict.HURTS if max(untrained) - min(untrained) > 1e-9 else Verdict.INCONCLUSIVE)
    assert "this arm failed in 3 of 3 seeds; failed runs count with their capped value" in explode.effect.note
    assert (crash.crashed, crash.failed, crash.final) == (3, 0, None)
    assert not result.complete


def test_load_of_experts(result):
    steps, shares = read_loads(result.arms[0].runs[0])[1, "text"]
    assert steps == (0, 1, 2, 3, 4)
    assert shares.shape == (4, 5)
    assert shares.sum(axis=0) == pytest.approx([1.0] * 5)
    assert shares[:, 0] == pytest.approx([0.25] * 4)


def test_tables_agree_with_the_records(result):
    effects, learning, also, stability, signs, models, fairness = report_tables(result)
    assert [row[0] for row in effects.rows] == list(ARMS)
    assert effects.rows[1][4] == "hurts"
    assert effects.rows[2][1] == "3 of 3 failed"
    effect = make_records(result)["arms"][1]["effect"]
    assert effects.rows[1][2] == f"{effect['centre']:+.4f}"
    assert effects.rows[1][3] == f"[{effect['interval']['low']:+.4f}, {effect['interval']['high']:+.4f}]"
    assert learning.rows[0][-1] == "3 of 3 seeds"
    assert learning.rows[0][3] == "45.6 % (14.0 %)"
    assert also.rows[1][:4] == ("throughput/samples_per_second (samples/s)", "–", "–", "115.0000 ± 5.0000")
    assert models.rows[2][-4:] == ("0/3", "3", "0", "0")
    # Three pairs differ, all against the arm: 2 of 8 ways. The validation loss is NaN from step 3 on.
    assert stability.rows[2][1:6] == ("0/3", "0.00 to 0.71", "0.25", "step 3", "–")
    assert stability.rows[0][1:5] == ("3/3", "0.29 to 1.00", "–", "–")
    assert stability.rows[3][1] == "–"  # crashes are no instability
    assert [(row[0], row[1]) for row in fairness.rows] == [("everything compared", "alike")]
    for table in (effects, learning, also, stability, signs, models, fairness):
        assert table.notes
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_schema_of_the_records(result):
    """The names that a user's script reads; `json.dumps` refuses what JSON has no number for."""
    records = json.loads(json.dumps(make_records(result)["arms"], allow_nan=False))
    assert list(records[1]) == [
        *(
            "study",
            "metric",
            "arm",
            "verdict",
            "note",
            "broken_guards",
            "card",
            "final",
            "untrained",
            "learned",
            "effect",
        ),
        *("accuracy", "majority", "also", "stability", "equal", "samples_per_second", "seconds"),
        *("finished", "diverged", "not_learned", "crashed", "planned", "solved"),
    ]
    assert list(records[1]["final"]) == ["mean", "deviation", "n"]
    assert list(records[1]["card"]) == ["total_parameters", "active_parameters", "active_flops_per_sample"]
    assert list(records[1]["effect"]) == [
        *("seeds", "left_out", "differences", "failed", "failures", "jump", "survivors", "survivors_interval"),
        *("mean", "centre", "bootstrap", "t", "interval", "p_t", "p_sign"),
        *("p_wilcoxon", "p_value", "p_adjusted", "p_outside", "p_outside_adjusted", "share_better", "seeds_needed"),
        *("more_lost", "losses", "guards", "verdict", "limit", "within", "sides"),
    ]
    assert list(records[1]["effect"]["interval"]) == ["low", "high", "method"]
    assert list(records[1]["stability"]) == ["runs", "survival", "interval", "test", "p", "recovery"]
    assert list(records[1]["stability"]["runs"][0]) == [
        *("diverged_at", "spikes_loss", "spikes_gradient", "spikes_update", "recovered", "recovery_steps"),
        *("recovery_tokens", "largest_attention_logit", "largest_router_logit", "largest_log_partition"),
        *("dead_share", "max_violation", "balance_share"),
    ]
    assert [(record["arm"], record["verdict"]) for record in records[:2]] == [
        ("baseline", "baseline"),
        ("slow", "hurts"),
    ]
    assert records[2]["final"] is None  # diverged


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_tables_fit(result, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    print_tables(console, report_tables(result))
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "slow" in text
    assert "hurts" in text
    assert ("seeds needed  " in text or "seeds better" in text) is (width == 120)
    assert ("more columns need a terminal of " in text) is (width == 80)


def test_figures_are_drawn_and_described(report, result, tmp_path):
    figures = {figure.name: figure for figure in report.figures}
    assert list(figures) == FIGURES
    for figure in figures.values():
        file = tmp_path / f"{figure.name}.png"
        file.write_bytes(figure.png)
        with Image.open(file) as image:
            assert image.width == 1040
            assert image.height > 250
            assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 50  # not empty
        assert len(figure.alt) > 60
        assert figure.table.rows
    assert "slow goes from" in figures["curves"].alt
    assert "hurts" in figures["effects"].alt
    curve = figures["curves"].table
    assert curve.columns[-1] == "step 4"
    assert (curve.rows[0][0], curve.rows[0][-1]) == ("baseline", f"{result.arms[0].final.mean:.4f}")


def test_finding_is_a_sentence(result):
    assert describe_arm(result, result.arms[1]).startswith(
        "slow: hurts. Compared with baseline, validation task loss changed by +"
    )


def figures_of(monkeypatch, module, draw, result):
    kept = []
    monkeypatch.setattr(module, "render_figure", lambda drawn, *rest: kept.append(drawn) or drawn)
    assert draw(result) is not None
    return kept[0]


def test_second_half_is_drawn_only_with_points_enough(result, monkeypatch):
    assert (
        len(figures_of(monkeypatch, curves, curves.draw_curves, result).axes) == 4
    )  # steps 2, 3, 4; curves above, differences below
    key = result.comparison.primary.metric
    ends = [
        dataclasses.replace(r, series={key: Series(s.steps[::2], s.values[::2])})
        for arm in result.arms
        for r in arm.runs
        if (s := r.series.get(key))
    ]
    arms = tuple(dataclasses.replace(arm, runs=tuple(r for r in ends if r.arm == arm.arm.name)) for arm in result.arms)
    thinned = dataclasses.replace(result, arms=arms)
    assert len(figures_of(monkeypatch, curves, curves.draw_curves, thinned).axes) == 2  # steps 2, 4


def test_steps_on_the_heatmap_are_whole_numbers(result, monkeypatch):
    runs = {arm.arm.name: tuple(dataclasses.replace(run, max_steps=2) for run in arm.runs) for arm in result.arms}
    short = dataclasses.replace(
        result, arms=tuple(dataclasses.replace(arm, runs=runs[arm.arm.name]) for arm in result.arms)
    )
    for shown in (result, short):
        figure = figures_of(monkeypatch, expert_load, expert_load.draw_expert_load, shown)
        figure.draw_without_rendering()  # ticks depend on the room
        for axes in figure.axes[:-1]:  # the last is the colour bar
            ticks = axes.get_xticks()
            assert len(ticks) >= 2
            assert all(tick == round(tick) for tick in ticks)


def test_many_arms_go_below_each_other(result, monkeypatch):
    shown = [arm for arm in result.arms if expert_load.read_loads(arm.runs[0])]
    arms = (*shown, *shown, *shown)[:3]
    monkeypatch.setattr(expert_load, "_ARMS_BESIDE", 2)
    three = dataclasses.replace(result, arms=arms)
    figure = figures_of(monkeypatch, expert_load, expert_load.draw_expert_load, three)
    *panels, _ = figure.axes  # the last is the colour bar
    num_layers = len(expert_load.read_loads(shown[0].runs[0]))
    assert len(panels) == 3 * num_layers
    grid = panels[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == (2 * num_layers, 2)


def test_without_data_there_is_no_figure(swept):
    plan, experiment = swept
    from lightning_moevlm.study.run.ledger import RunState, Status

    empty = collect_results(plan, [(run, RunState(Status.PLANNED)) for run in plan.runs], experiment.uri)
    assert draw_all(empty) == []
    assert "No run has a result yet" in make_report(describe_origin(plan, empty), empty).learned


class Page(HTMLParser):
    """What a page refers to and whether its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str]] = []
        self.outside: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in ("meta", "img", "link", "wbr"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(attributes)
        self.scripts += tag == "script"
        for name in ("src", "href"):
            if name in attributes and not attributes[name].startswith(("data:", "#")):
                self.outside.append(attributes[name])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_from_outside(swept, report, result, tmp_path):
    plan, _ = swept
    file = write_report(report, tmp_path / "report")
    html = file.read_text()
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.outside == []
    assert page.scripts == 0
    assert "url(" not in html
    assert "@import" not in html
    assert len(page.images) == len(FIGURES)
    for image in page.images:
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert base64.b64decode(data).startswith(b"<svg")
        assert image["alt"]
    # the rules, a table behind each figure, every table of the report, a log behind each crash
    assert html.count("<details>") == 1 + len(FIGURES) + len(report_tables(result)) + 3
    answer, rest = html.split('<nav aria-labelledby="contents">')
    assert answer.count("<img ") == 1 and "slow: hurts. " in answer  # the finding and its figure stand first
    curves = rest.partition('id="accuracy"')[2].partition("</figure>")[0]
    assert "Has anything been learned?" in curves  # a table folds under the figure that it belongs to
    assert "Learns &lt;slowly&gt;." in html
    assert "the tiny training was told to crash" in html
    assert "prefers-color-scheme: dark" in html
    assert 'class="incomplete"' in html
    for run in plan.runs:
        assert f"-c {plan.run_folder(run)}/overrides.yaml" in html

    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "| slow | " in markdown
    for name in re.findall(r"\]\((\w+\.png)\)", markdown):
        assert (tmp_path / "report" / name).is_file()
    records = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [record["arm"] for record in records] == list(ARMS)
    for name in ("factors", "learning_rates", "fairness"):
        assert json.loads((tmp_path / "report" / f"{name}.json").read_text()) == []
    assert "Fisher" in html and "Fisher" in markdown
    assert sorted(f.name for f in tmp_path.iterdir()) == ["report"]


def test_summary_run_is_used_again(swept, report, tmp_path):
    plan, experiment = swept
    write_report(report, tmp_path / "report")
    first = log_summary(experiment, report, tmp_path / "report")
    assert log_summary(experiment, report, tmp_path / "report") == first
    [row] = find_runs(experiment.uri, experiment.name, {"role": "summary"})
    assert row.tags["sweep"] == "tiny"
    assert row.status == "FINISHED"
    assert "slow: hurts" in row.tags["mlflow.note.content"]
    client = MlflowClient(experiment.uri)
    assert {"report/report.html", "report/curves.png"} <= {f.path for f in client.list_artifacts(first, "report")}
    path = "report/tables/effect_on_validation_task_loss.json"
    assert {"path": path, "type": "table"} in json.loads(row.tags["mlflow.loggedArtifacts"])
    table = json.loads(Path(client.download_artifacts(first, path, str(tmp_path))).read_text())
    assert [cells[0] for cells in table["data"]] == list(ARMS)
    assert len(experiment.ids()) == len(plan.runs)  # the summary is no arm


def test_every_arm_looks_different():
    arms = tuple(f"arm{i}" for i in range(30))
    chosen = choose_looks(("base", *arms), "base")
    assert len(set(chosen.values())) == 31


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (1500, "1.5 k"), (914_000, "914 k"), (1.9e7, "19 M"), (2.5e12, "2.5 T")]
)
def test_scaled(number, text):
    assert format_count(number) == text
