"""Figures of costs, learning rates, factors, flow and spikes, from results whose numbers are given."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
import yaml
from matplotlib.text import Text
from PIL import Image

from lightning_moevlm.study.compare.arm_costs import compute_costs
from lightning_moevlm.study.compare.collect_results import compare_arms
from lightning_moevlm.study.compare.collect_results import to_result as result_of_run
from lightning_moevlm.study.compare.results import Mean
from lightning_moevlm.study.report.figures import MANY_ARMS, draw_all, select_legible
from lightning_moevlm.study.report.figures import report_figure as drawing
from lightning_moevlm.study.report.figures.curves import draw_curves
from lightning_moevlm.study.report.figures.expert_flow import draw_expert_flow, read_flows, shares_experts
from lightning_moevlm.study.report.figures.interactions import draw_interactions
from lightning_moevlm.study.report.figures.learning_rates import draw_learning_rates, find_best_rate
from lightning_moevlm.study.report.figures.pareto import Cost, draw_pareto, find_front
from lightning_moevlm.study.report.figures.spike_timeline import build_timeline, draw_spikes
from lightning_moevlm.study.report.tables.costs_table import costs_table
from lightning_moevlm.study.report.tables.receipts_table import receipts_table
from lightning_moevlm.study.run.ledger import RunState, Status
from lightning_moevlm.study.statistics.verdict import Verdict
from lightning_moevlm.tracking.read.series import Series
from tests.study.tiny_study import plan_of, write_project

SEEDS = [0, 1, 2]
FAST = {"arms": {"baseline": None, "fast": {"model.speed": 0.9}}}
RATES = (0.01, 0.1, 1.0)
FACTORS = ("skew", "speed")


def to_result(tmp_path, study, series_of, tags_of=lambda run: {}, stopped=()):
    """Compare runs that logged series_of(run); None: the run diverged at step 3. stopped: arms that were withdrawn."""
    file = write_project(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}", {"seeds": SEEDS} | study)
    written = yaml.safe_load(file.read_text())
    file.write_text(
        yaml.safe_dump({key: value for key, value in written.items() if value is not None}, sort_keys=False)
    )
    plan = plan_of(file)
    results = []
    for run in plan.runs:
        series = series_of(run)
        status = Status.STOPPED if run.arm in stopped else Status.FINISHED if series else Status.DIVERGED
        lost = {"val/task_loss": Series((0, 3), (7.0, math.nan)), "train/task_loss": Series((3,), (math.nan,))}
        state = RunState(status, run.name, started=0.0, ended=10.0 + run.seed)
        results.append(result_of_run(run, state, series or lost, tags_of(run)))
    return compare_arms(plan.comparison, plan.cards, results)


def ended_at(final, **more):
    others = {key.replace("__", "/"): Series((4,), (value,)) for key, value in more.items()}
    return {"val/task_loss": Series((0, 4), (7.0, final))} | others


def is_drawn(figure):
    """Say whether a figure has a sentence, a table, and more than a ground as PNG and as SVG."""
    with Image.open(io.BytesIO(figure.png)) as image:
        colours = len(image.convert("RGB").getcolors(maxcolors=2**24))
    return colours > 20 and figure.svg.count(b"<path") > 5 and len(figure.alt) > 60 and bool(figure.table.rows)


def test_front_holds_arms_shown_to_be_better_than_all_cheaper_ones():
    # b is shown better than a. c is better than b on average, yet not shown to be. d costs as much as a and is worse.
    costs = {"e": 9.0, "d": 1.0, "a": 1.0, "b": 2.0, "c": 3.0}
    finals = {"a": 5.0, "b": 4.0, "c": 3.9, "d": 6.0, "e": 3.0}
    cost = Cost("memory", "MiB", {arm: Mean(value, None, 1) for arm, value in costs.items()})
    means = {arm: Mean(value, None, 1) for arm, value in finals.items()}
    assert find_front(cost, means, lambda arm, other: finals[arm] < finals[other] - 0.5) == ("a", "b", "e")
    assert find_front(cost, means, lambda arm, other: False) == ("d",)  # nothing is shown: the first of the cheapest


@pytest.mark.usefixtures("unrendered")
def test_points_within_noise_of_each_other_are_not_both_ringed(tmp_path):
    """`fast` takes less memory; its loss differs from the baseline's by -0.3, +0.1 and +0.3, which shows nothing."""
    noise = {"baseline": (0.0, 0.0, 0.0), "fast": (-0.3, 0.1, 0.3)}

    def series(run):
        return ended_at(5.0 + noise[run.arm][run.seed], memory__peak_device=100.0 + len(run.arm))

    figure = draw_pareto(to_result(tmp_path, FAST, series))
    assert "Over peak memory the front is fast." in figure.alt
    assert [row[-1] for row in figure.table.rows] == ["108.0 ± 0.0", "104.0 ± 0.0, on the front"]


@pytest.mark.usefixtures("unrendered")
def test_curves_have_paired_differences(tmp_path):
    """Differences at step 4 are 0.1, 0.3, 0.5: mean 0.3, s 0.2, half width 4.303 * 0.2 / sqrt(3) = 0.4968."""
    figure = draw_curves(
        to_result(tmp_path, FAST, lambda run: ended_at(5.0 + (run.arm == "fast") * (0.1 + 0.2 * run.seed)))
    )
    assert figure.table.rows == (
        ("baseline", "7.0000", "5.0000"),
        ("fast", "7.0000", "5.3000"),
        ("fast minus baseline", "+0.0000 [+0.0000, +0.0000]", "+0.3000 [-0.1968, +0.7968]"),
    )
    assert "Below, differences from baseline, paired by seed, with 95 % intervals." in figure.alt
    assert "fast ends at +0.3000 [-0.1968, +0.7968]." in figure.alt


def test_costs_are_paired_by_seed(tmp_path):
    # Without a batch size the samples of a step are unknown, so only memory can be compared here.
    peaks = {"baseline": (100.0, 200.0, 400.0), "fast": (110.0, 210.0, 440.0)}
    result = to_result(
        tmp_path, FAST, lambda run: ended_at(5.0 + run.seed, memory__peak_process=peaks[run.arm][run.seed])
    )
    base, fast = compute_costs(result)
    assert (base.more_memory, base.memory.mean) == (None, pytest.approx(700 / 3))
    assert fast.more_memory.mean == pytest.approx((0.10 + 0.05 + 0.10) / 3)
    assert fast.more_time is None
    table = costs_table(result)
    assert table.rows[1][3:5] == ("253.3 ± 169.2", "+8.3 ± 2.9 %")
    # 700 / 3 = 233.3; squares of -133.3, -33.3, 166.7 sum to 46,667, / 2 = 23,333, root 152.8; 152.8 / 233.3 = 65.5 %
    assert any("peak memory varies by 65.5 %" in note for note in table.notes)


def test_time_per_step_is_that_of_the_batch(tmp_path):
    study = FAST | {"base": ["base.yaml", "data.yaml"]}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": {"batch_size": 20}}))
    speeds = {"baseline": 200.0, "fast": 160.0}
    key = "throughput__samples_per_second"
    base, fast = compute_costs(to_result(tmp_path, study, lambda run: ended_at(5.0, **{key: speeds[run.arm]})))
    assert base.seconds.mean == pytest.approx(0.1)  # 20 / 200
    assert fast.more_time.mean == pytest.approx(0.25)  # 20 / 160 = 0.125


def test_pareto_leaves_out_survivors(tmp_path):
    arms = {"baseline": None, "fast": {"model.speed": 0.9}, "wild": {"model.speed": 3.0}}

    def series(run):
        if run.arm == "wild" and run.seed == 0:
            return None
        return ended_at({"baseline": 5.0, "fast": 4.0, "wild": 1.0}[run.arm], memory__peak_device=100.0 + len(run.arm))

    figure = draw_pareto(to_result(tmp_path, {"arms": arms}, series))
    assert is_drawn(figure)
    # All take 11 s on average and compute the same; memory is 108 MiB of the baseline and 104 MiB of the better arm.
    assert "Over peak memory the front is fast." in figure.alt
    assert "Wall time is the same in all arms." in figure.alt
    assert [row[-1] for row in figure.table.rows] == ["108.0 ± 0.0", "104.0 ± 0.0, on the front", "–"]


def test_learning_rates(tmp_path):
    arms = {f"lr_{i}": {"model.optimizer.init_args.lr": rate} for i, rate in enumerate(RATES)}
    arms |= {f"more_{i}": change | {"model.skew": 0.3} for i, change in enumerate(arms.values())}
    arms = {"baseline": None} | arms
    ends = {"baseline": 6.0, "lr_0": 5.0, "lr_1": 4.0, "lr_2": None, "more_0": 5.5, "more_1": 5.0, "more_2": 4.5}
    result = to_result(tmp_path, {"arms": arms}, lambda run: None if ends[run.arm] is None else ended_at(ends[run.arm]))
    assert [find_best_rate(result, one) for one in result.ladders] == [0.1, 1.0]
    figure = draw_learning_rates(result)
    assert is_drawn(figure)
    # Untrained 7: (5 + 4 + 7) / 3 - 4 = 4 / 3; (5.5 + 5 + 4.5) / 3 - 4.5 = 0.5
    assert "lr: sensitivity 1.3333 ± 0.0000, stable up to 0.1; best at 0.1 with 4.0000." in figure.alt
    assert "more: sensitivity 0.5000 ± 0.0000, stable up to 1; best at 1 with 4.5000." in figure.alt
    assert [row[0] for row in figure.table.rows] == list(arms)[1:]
    assert figure.table.rows[2][3:] == ("7.0000 ± 0.0000", "0/3", "")  # capped at the untrained model's


def test_a_ladder_of_two_rates_is_no_curve(tmp_path):
    arms = {f"lr_{i}": {"model.optimizer.init_args.lr": rate} for i, rate in enumerate(RATES[:2])}
    result = to_result(tmp_path, {"arms": {"baseline": None} | arms}, lambda run: ended_at(5.0))
    assert len(result.ladders) == 1
    assert draw_learning_rates(result) is None


def test_interactions(tmp_path):
    factors = {name: {"on": {f"model.{name}": 0.9}} for name in FACTORS}

    def series(run):
        skewed, fast = (run.resolved["model"][name] == 0.9 for name in FACTORS)
        return ended_at(5.0 + run.seed - 1.0 * fast + 0.5 * skewed - 0.25 * (fast and skewed))

    figure = draw_interactions(to_result(tmp_path, {"arms": None, "factors": factors, "design": "factorial"}, series))
    assert is_drawn(figure)
    # skew: +0.5 with speed off, +0.25 with it on; speed: -1 and -1.25; the difference of either is -0.25.
    cells = {
        (name, column): cell for name, *row in figure.table.rows for column, cell in zip(FACTORS, row, strict=True)
    }
    assert cells["skew", "skew"].startswith("+0.3750 [")
    assert cells["speed", "speed"].startswith("-1.1250 [")
    assert cells["skew", "speed"] == cells["speed", "skew"]
    assert cells["skew", "speed"].startswith("-0.2500 [")
    assert figure.alt.endswith("Coloured, since the interval excludes 0: skew, speed, skew x speed.")


@pytest.mark.usefixtures("unrendered")
def test_an_interaction_whose_interval_contains_0_has_no_colour(tmp_path, monkeypatch):
    factors = {name: {"on": {f"model.{name}": 0.9}} for name in FACTORS}

    def series(run):
        skewed, fast = (run.resolved["model"][name] == 0.9 for name in FACTORS)
        return ended_at(5.0 + run.seed - 1.0 * fast + 0.1 * (run.seed - 1) * skewed)

    figures = []
    monkeypatch.setattr(drawing, "_render_svg", lambda figure: figures.append(figure) or b"<svg/>")
    figure = draw_interactions(to_result(tmp_path, {"arms": None, "factors": factors, "design": "factorial"}, series))
    assert figure.alt.endswith("Coloured, since the interval excludes 0: speed.")
    [image] = figures[0].axes[0].images
    assert np.ma.getmaskarray(image.get_array()).tolist() == [[True, True], [True, False]]
    assert image.norm.vmax == pytest.approx(1.0)  # speed, -1 in every seed, reaches further than skew's 0.25
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    assert "[-0.25, +0.25]" in texts  # 4.303 * 0.1 / sqrt(3)


def loads(shares, block=1):
    return {
        f"load/block{block}/{modality}/expert{expert}": Series((0, 4), (0.5, share))
        for modality, row in shares.items()
        for expert, share in enumerate(row)
    }


def test_flow_of_modalities_to_experts(tmp_path):
    shares = {"image": (0.75, 0.25), "text": (0.1, 0.9)}
    tags = {"dispatch/backbone.blocks.1.ffn": "x"}
    result = to_result(tmp_path, FAST, lambda run: ended_at(5.0) | loads(shares), lambda run: tags)
    assert read_flows(result.arms[0].runs[0]) == {1: shares}
    figure = draw_expert_flow(result)
    assert is_drawn(figure)
    assert "block 1 text most to expert 1 90.0 %, expert 0 10.0 %" in figure.alt
    assert figure.table.rows[0] == ("baseline", "seed 0", "block 1", "image", "shared", "75.0 %", "25.0 %")


@pytest.mark.parametrize(
    ("layers", "is_shared"),
    [(["blocks.1.ffn"], True), (["blocks.1.ffn.image", "blocks.1.ffn.text"], False), (["blocks.11.ffn"], False)],
)
def test_experts_are_shared_where_a_block_has_one_mixture(layers, is_shared):
    assert shares_experts({f"dispatch/backbone.{layer}": "grouped" for layer in layers}, 1) is is_shared


def test_spikes_over_time(tmp_path):
    steps = tuple(range(30))
    loss = [5.0 + 0.01 * (step % 2) for step in steps]
    loss[20] = 9.0

    def series(run):
        if run.arm == "fast" and run.seed == 2:
            return None
        spiky = run.arm == "fast" and run.seed == 1
        values = tuple(loss) if spiky else (5.0, 5.01) * 15
        return ended_at(5.0) | {"train/task_loss": Series(steps, values)}

    result = to_result(tmp_path, FAST, series)
    lines = {run.name: build_timeline(run) for arm in result.arms for run in arm.runs}
    assert lines["fast-seed1"].spiked == ((20,), None, None)
    assert lines["fast-seed2"].diverged_at == 3
    assert lines["baseline-seed0"].is_steady
    figure = draw_spikes(result)
    assert is_drawn(figure)
    assert "fast-seed1: 1 of task loss, first at step 20." in figure.alt
    assert figure.table.rows == (
        ("fast-seed1", "20", "too few points", "too few points", "–", "–"),
        ("fast-seed2", "too few points", "too few points", "too few points", "step 3", "–"),
    )
    steady = dataclasses.replace(result, arms=result.arms[:1])
    assert draw_spikes(steady) is None


def test_receipts_are_shown_where_runs_have_them(tmp_path):
    def tags(run):
        if run.arm == "fast":
            told = f"alive: norm 0.{run.seed} (step 300)" if run.seed else "dead: norm 0 (step 50)"
            return {"receipt/router_z": told, "arm": "fast"}
        return {"arm": run.arm}

    table = receipts_table(to_result(tmp_path, FAST, lambda run: ended_at(5.0), tags))
    assert table.columns == ("switch", "baseline", "fast")
    assert table.rows == (("router_z", "–", "dead (1 of 3), alive (2 of 3)"),)
    assert table.notes[1:] == ("fast, router_z: dead, norm 0 (step 50).",)  # what is alive needs no words
    assert receipts_table(to_result(tmp_path, FAST, lambda run: ended_at(5.0))) is None


def test_many_arms_become_few(tmp_path):
    arms = {"baseline": None} | {f"arm_{i}": {"model.speed": 1.0 + i} for i in range(24)}
    effects = {name: 0.1 * i * (-1) ** i for i, name in enumerate(arms)}
    noise = np.random.default_rng(0).normal(0, 0.01, 3).tolist()

    def series(run):
        peak = 100.0 + effects[run.arm]
        return ended_at(5.0 + effects[run.arm] * (1 + noise[run.seed]), memory__peak_process=peak)

    result = to_result(tmp_path, {"arms": arms}, series)
    kept = [arm.arm.name for arm in select_legible(result).arms]
    assert len(kept) == MANY_ARMS == 20
    assert kept == ["baseline", *(f"arm_{i}" for i in range(5, 24))]  # the effects grow with i
    assert select_legible(select_legible(result)).arms == select_legible(result).arms
    assert all(is_drawn(figure) for figure in draw_all(result))


def test_svg_follows_the_scheme_of_the_page(tmp_path):
    figures = draw_all(to_result(tmp_path, FAST, lambda run: ended_at(5.0 + run.seed, memory__peak_process=9.0)))
    assert [figure.name for figure in figures] == ["effects", "curves", "throughput"]
    for figure in figures:
        text = figure.svg.decode()
        assert "prefers-color-scheme:dark" in text
        assert "var(--ink)" in text
        assert not re.search(r"(fill|stroke): ?#(000000|ffffff)", text, re.IGNORECASE)
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", text)  # nothing from outside


@pytest.mark.usefixtures("unrendered")
def test_unfinished_runs_are_marked_in_every_figure(tmp_path, monkeypatch):
    """Of three seeds one of `fast` diverges; `slow` is withdrawn as a whole at step 2."""
    arms = FAST["arms"] | {"slow": {"model.speed": 0.01}}
    even = loads({"text": (0.5, 0.5)})
    study = {"arms": arms, "futility_stop": {"at_step": 2, "worse_by": 0.5}}

    def series(run):
        if run.arm == "fast" and run.seed == 1:
            return None
        if run.arm == "slow":
            return {key: Series((0, 2), (7.0, 9.0)) for key in ("val/task_loss", "train/task_loss")} | even
        return ended_at(5.0 + run.seed, throughput__samples_per_second=99.0, val__accuracy_text=0.5) | even

    result = to_result(tmp_path, study, series, stopped=["slow"])
    assert result.arms[-1].verdict is Verdict.STOPPED_EARLY
    figures = []
    monkeypatch.setattr(drawing, "_render_svg", lambda figure: figures.append(figure) or b"<svg/>")
    names = [each.name for each in draw_all(result)]
    told = {
        name: " ".join(text.get_text() for text in figure.findobj(Text))
        for name, figure in zip(names, figures, strict=True)
    }
    for name in ("effects", "curves", "accuracy", "spikes", "expert_load", "expert_flow", "throughput"):
        assert "stopped early" in told[name], name
        assert "diverged" in told[name], name
    curves = figures[names.index("curves")].axes[0]
    marks = {line.get_marker(): line.get_xydata()[-1].tolist() for line in curves.lines if len(line.get_xdata()) == 1}
    assert marks == {"x": [0.0, 7.0], "|": [2.0, 9.0]}  # the last number, of the diverged run the first one


@pytest.mark.usefixtures("unrendered")
def test_runs_that_did_not_learn_are_lines_of_their_own(tmp_path, monkeypatch):
    """Every run of `fast` ends far above the baseline's: no mean is drawn, and the legend names it all the same."""
    study = FAST | {"did_not_learn": {"share_of_healthy": 0.8}}
    result = to_result(tmp_path, study, lambda run: ended_at(5.0 if run.arm == "fast" else 3.0 + run.seed / 10))
    figures = []
    monkeypatch.setattr(drawing, "_render_svg", lambda figure: figures.append(figure) or b"<svg/>")
    draw_curves(result)
    lines = figures[0].axes[0].lines
    assert sum(line.get_linestyle() == ":" for line in lines) == len(SEEDS)
    assert sum(line.get_marker() == "*" for line in lines) == len(SEEDS)
    told = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert told == ["baseline", "fast (every run failed)", "a run did not learn"]
    assert not any(arm.final for arm in result.arms if arm.arm.name == "fast")


@pytest.mark.usefixtures("unrendered")
def test_many_arms_have_differences_without_bands_and_say_so(tmp_path, monkeypatch):
    arms = {"baseline": None} | {f"arm_{i}": {"model.speed": 1.0 + i} for i in range(9)}
    figures = []
    monkeypatch.setattr(drawing, "_render_svg", lambda figure: figures.append(figure) or b"<svg/>")
    figure = draw_curves(to_result(tmp_path, {"arms": arms}, lambda run: ended_at(5.0 + run.seed)))
    above, below = figures[0].axes
    assert (len(above.collections), len(below.collections)) == (1, 0)  # the baseline's band
    assert below.get_ylabel() == "arm minus baseline\n(mean)"
    assert "paired by seed. arm_0 ends at +0.0000" in figure.alt
