"""The matrix by hand: cells, missing and failed runs, side effects, repetition, and what is written of it."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_moevlm.study.compare.results import read_finals
from lightning_moevlm.study.matrix.figure import draw_matrix
from lightning_moevlm.study.matrix.judge_matrix import make_matrix
from lightning_moevlm.study.matrix.records import Matrix, Row
from lightning_moevlm.study.matrix.strongest import find_strongest, repeat
from lightning_moevlm.study.matrix.surprises import describe_surprises, find_surprises
from lightning_moevlm.study.matrix.tables import (
    advice_table,
    all_tables,
    fresh_table,
    missing_table,
    recommendation_table,
    share_table,
    side_effect_table,
    stability_table,
)
from lightning_moevlm.study.matrix.texts import (
    describe_error,
    describe_fresh,
    describe_missing,
    describe_rows,
    describe_whole,
)
from lightning_moevlm.study.matrix.write_matrix import write_matrix
from lightning_moevlm.study.plan.planned_run import PlannedRun
from lightning_moevlm.study.statistics.cures.cure_effect import CureVerdict
from lightning_moevlm.tracking.read.series import Series
from tests.study.matrix.cure_runs import UNTRAINED, Final, loss_by_share, results_of, row_of, write_cures
from tests.study.tiny_study import plan_of

CURES = ("warm", "clip", "norm")


@pytest.fixture
def row(tmp_path: Path) -> Callable[..., Row]:
    """Return the unjudged row of a study named fever with given results."""

    def make(final: Final, name: str = "fever", cures: tuple[str, ...] = CURES, **design: object) -> Row:
        return row_of(write_cures(tmp_path, name, cures, design=design), final)

    return make


def matrix_of(*rows: Row, fresh: dict[str, Row] | None = None) -> Matrix:
    return make_matrix("cures", "ablations/cures", rows, fresh or {})


def test_cells_of_an_illness(row) -> None:
    judged = matrix_of(row(loss_by_share(warm=1.0, clip=0.5, norm=-0.5, all=0.9, all_but_warm=0.1)))
    [fever] = judged.rows
    assert fever.proved
    assert fever.damage is not None
    assert fever.damage.mean == pytest.approx(3.0, abs=0.02)
    cells = {cell.label: cell for cell in fever.cells}
    assert list(cells) == ["warm", "clip", "norm", "all", "all but warm", "all but clip", "all but norm"]
    assert [cell.kind for cell in fever.cells] == ["alone"] * 3 + ["all"] + ["all_but"] * 3
    assert cells["all but warm"].cures == ("clip", "norm")
    shares = {label: cell.effect.share.estimate for label, cell in cells.items() if cell.effect}
    assert shares == pytest.approx(
        {"warm": 1.0, "clip": 0.5, "norm": -0.5, "all": 0.9, "all but warm": 0.1, "all but clip": 0, "all but norm": 0},
        abs=0.02,
    )
    verdicts = {label: cell.effect.verdict for label, cell in cells.items() if cell.effect}
    assert (verdicts["warm"], verdicts["norm"]) == (CureVerdict.CURES, CureVerdict.HARMS)
    assert judged.cures == CURES
    assert judged.missing == {}


def test_each_family_is_corrected_by_itself(row) -> None:
    final = loss_by_share(warm=1.0, clip=0.5, norm=-0.5, all=0.9)
    alone = {cell.arm: cell.effect for cell in row(final).cells if cell.kind == "alone" and cell.effect}
    judged = {cell.arm: cell.effect for cell in matrix_of(row(final)).rows[0].cells if cell.effect}
    ranked = sorted(alone, key=lambda arm: alone[arm].share.p_value or 1.0)
    assert judged[ranked[0]].share.p_adjusted == pytest.approx(
        3 * alone[ranked[0]].share.p_value
    )  # of three, and not of seven


def test_the_whole_matrix_asks_for_more_than_a_row(row) -> None:
    """Ten cells instead of five: a cell with p of about 0.008 holds in its row, and not over all."""
    final = loss_by_share(damage=0.2, warm=1.0, clip=1.0)
    one, other = (matrix_of(row(final, name)).rows[0] for name in ("fever", "chill"))
    assert {cell.stands for cell in one.cells if cell.effect and cell.effect.verdict is CureVerdict.UNCLEAR} <= {True}
    both = matrix_of(row(final, "fever"), row(final, "chill"))
    before = {(cell.arm, str(cell.effect.verdict)) for cell in one.cells if cell.effect}
    assert {(cell.arm, str(cell.effect.verdict)) for cell in both.rows[0].cells if cell.effect} == before  # own family
    lost = [cell.arm for cell in both.rows[0].cells if not cell.stands]
    assert lost and other.illness == "chill"
    assert f"of {len(before) * 2 - _unclear(both)} verdicts also stand" in describe_whole(both)


def test_a_surprise_says_if_it_does_not_stand_over_the_whole_matrix(row) -> None:
    judged = matrix_of(row(loss_by_share(warm=1.0, clip=-1.0), recommendations={}))
    [fever] = judged.rows
    fallen = [replace(cell, stands=cell.stands and cell.label != "clip") for cell in fever.cells]
    told = find_surprises(replace(judged, rows=(replace(fever, cells=tuple(fallen)),)))
    assert {one.cures: one.text.endswith(" It does not stand over the whole matrix.") for one in told} == {
        "clip": True,
        "warm": False,
    }


def test_the_page_states_the_chance_of_a_false_claim(row) -> None:
    """Single cures and combinations of two illnesses are four families: 1 - 0.95^4 = 0.185."""
    final = loss_by_share(warm=1.0)
    assert "The 4 families of cells on this page together: up to 19%." in describe_error(
        matrix_of(row(final, "fever"), row(final, "chill"))
    )
    assert "The one family of cells on this page" in describe_error(matrix_of(row(final, all=[], cures=("warm",))))
    assert describe_error(matrix_of(row(lambda arm, seed: math.sin(7 * seed + len(arm))))) == ""  # no damage


def _unclear(matrix: Matrix) -> int:
    cells = [cell for one in matrix.rows for cell in one.cells]
    return sum(cell.effect is None or cell.effect.verdict is CureVerdict.UNCLEAR for cell in cells)


def test_missing_runs_are_named_and_their_cell_is_empty(row) -> None:
    usual = loss_by_share(warm=1.0, clip=0.5)

    def final(arm: str, seed: int) -> float | None:
        return None if (arm, seed) in {("sick__clip", 1), ("healthy__warm", 0)} else usual(arm, seed)

    judged = matrix_of(row(final))
    alone = judged.rows[0].alone()
    assert alone["clip"].effect is None
    assert alone["warm"].effect is not None
    assert judged.missing == {"fever": ("sick__clip-seed1", "healthy__warm-seed0")}
    assert missing_table(judged).rows == (("fever", "2", "sick__clip (1), healthy__warm (0)"),)
    assert share_table(judged).rows[0][2] == "missing: 1 runs"
    assert describe_missing(judged).startswith("2 runs have no result yet")
    # the cell that is missing counts in the correction: no other p gets smaller by its absence
    whole = matrix_of(row(usual)).rows[0].alone()["warm"].effect
    assert whole is not None and alone["warm"].effect.share.p_adjusted == pytest.approx(whole.share.p_adjusted)


def test_without_sick_runs_nothing_is_judged(row) -> None:
    judged = matrix_of(row(lambda arm, seed: None if arm == "sick" else 3.0))
    [fever] = judged.rows
    assert fever.damage is None and not fever.proved
    assert all(cell.effect is None for cell in fever.cells)
    assert describe_rows(judged) == ("fever: not run yet.",)


def test_an_illness_that_is_not_proved_has_no_cure(row) -> None:
    judged = matrix_of(row(loss_by_share(damage=0.0, warm=1.0)))
    assert all(cell.effect and cell.effect.verdict is CureVerdict.UNCLEAR for cell in judged.rows[0].cells)
    assert all(cell.effect and cell.effect.share is None for cell in judged.rows[0].cells)
    assert "not proved" in describe_rows(judged)[0]


def test_failed_runs_count_as_untrained(row, tmp_path: Path) -> None:
    usual = loss_by_share(warm=1.0)
    judged = matrix_of(row(lambda arm, seed: math.inf if arm == "sick" else usual(arm, seed)))
    [fever] = judged.rows
    assert fever.damage is not None
    assert (fever.damage.healthy.stable, fever.damage.sick.stable, fever.damage.sick.total) == (3, 0, 3)
    assert fever.damage.mean == pytest.approx(UNTRAINED - 3.1, abs=0.01)  # healthy: 3.0, 3.1, 3.2
    plan = plan_of(tmp_path / "fever.yaml")
    runs = [run for run in results_of(plan, lambda arm, seed: math.inf) if run.arm == "sick"]
    assert {final.value for final in read_finals(runs, plan.comparison.primary).values()} == {UNTRAINED}


def test_a_run_that_did_not_learn_is_a_failed_one(tmp_path: Path) -> None:
    rule = {"share_of_healthy": 0.8}  # 9 to 3 is healthy progress; 6 is half of it
    file = write_cures(tmp_path, "fever", ("warm", "clip"), did_not_learn=rule)
    [fever] = matrix_of(row_of(file, loss_by_share(warm=1.0))).rows
    assert fever.damage is not None
    assert (fever.damage.healthy.stable, fever.damage.sick.stable) == (3, 0)
    assert fever.damage.mean == pytest.approx(3.0, abs=0.02)  # with their own values, better than the untrained one
    stable = {cell.label: cell.effect.survival.stable for cell in fever.cells if cell.effect and cell.kind == "alone"}
    assert stable == {"warm": 3, "clip": 0}


def test_a_cure_that_two_studies_try_on_one_healthy_model_is_one_record(row) -> None:
    offsets = {"healthy__warm": 0.4}
    rows = [
        row(loss_by_share(warm=1.0, **offsets), "fever"),
        row(loss_by_share(clip=1.0, **offsets), "chill", ("warm", "clip")),
        row(loss_by_share(warm=0.3), "deep", ("warm",), dose={"model.skew": 0.3}),
    ]
    judged = matrix_of(*rows)
    studies = {one.cure: one.studies for one in judged.side_effects}
    assert studies == {"warm": ("fever", "chill", "deep"), "clip": ("fever", "chill"), "norm": ("fever",)}
    warm = judged.side_effects[0]
    assert warm.effect is not None
    assert (str(warm.effect.verdict), warm.time) == ("hurts", (0.0, "wall"))
    assert warm.effect.mean == pytest.approx(0.4, abs=0.02)
    assert judged.cures[0] == "warm"  # most illnesses have it


def test_advice_names_side_effects_on_the_healthy_model_of_the_illness(row) -> None:
    """Two bases: the cure costs 0.4 on the one that two studies share, and gains 0.2 on the other."""
    rows = [
        row(loss_by_share(warm=1.0, healthy__warm=0.4), "fever", ("warm",)),
        row(loss_by_share(warm=1.0, healthy__warm=0.4), "chill", ("warm",)),
        row(loss_by_share(warm=1.0, healthy__warm=-0.2), "deep", ("warm",)),
    ]
    [own] = rows[2].side_effects
    other = replace(own, healthy=frozenset({"another base"}))
    judged = matrix_of(*rows[:2], replace(rows[2], side_effects=(other,)))
    assert [tuple(model) for model in judged.by_healthy_model] == [("warm",), ("warm",)]
    advice = {cells[1]: cells[3] for cells in advice_table(judged).rows}
    assert float(advice["fever"].split()[0]) == pytest.approx(0.4, abs=0.02) and advice["chill"] == advice["fever"]
    assert float(advice["deep"].split()[0]) == pytest.approx(-0.2, abs=0.02)
    assert draw_matrix(judged).png.startswith(b"\x89PNG")


def test_strongest_cells_are_repeated_on_fresh_seeds(row, tmp_path: Path) -> None:
    first = row(loss_by_share(warm=1.0, clip=0.5, norm=-0.3), fresh_seeds=[7, 8, 9], all=[])
    judged = matrix_of(first)
    assert find_strongest(judged, frozenset()) == {}  # no study has fresh seeds
    assert find_strongest(judged, frozenset({"fever"})) == {"fever": ("sick__warm", "sick__clip", "sick__norm")}
    again = repeat(plan_of(tmp_path / "fever.yaml").study, ("sick__warm", "sick__norm"))
    assert (again.comparison.name, again.comparison.seeds) == ("fever_fresh", (7, 8, 9))
    assert [arm.name for arm in again.comparison.arms] == ["healthy", "sick", "sick__warm", "sick__norm"]

    fresh = row(loss_by_share(warm=1.0, norm=0.5), all=[])
    both = matrix_of(first, fresh={"fever": fresh})
    alone = both.rows[0].alone()
    assert (alone["warm"].agrees, alone["norm"].agrees) == (True, False)
    assert "agree" in fresh_table(both).rows[0] and "differ" in fresh_table(both).rows[2]


def test_fresh_seeds_decide_a_cell_that_was_named_for_them(row, tmp_path: Path) -> None:
    """Undone are 3, 0.1 and 2 of a damage of 3: unclear. On fresh seeds it is 3 in each."""

    def first(arm: str, seed: int) -> float:
        return loss_by_share()(arm, seed) - (3.0, 0.1, 2.0)[seed] * (arm in ("sick__warm", "sick__clip"))

    design = {"all": [], "on_healthy": [], "fresh_seeds": [7, 8, 9], "fresh_arms": ["sick__warm"]}
    before = row(first, **design)
    assert [cell.is_named for cell in before.cells] == [True, False, False]
    both = matrix_of(before, fresh={"fever": row(loss_by_share(warm=1.0, clip=1.0), **design)})
    warm, clip, _ = both.rows[0].cells
    assert warm.effect and clip.effect and warm.effect.verdict is clip.effect.verdict is CureVerdict.UNCLEAR
    assert (warm.decisive, clip.decisive) == (warm.fresh, clip.effect)  # of clip, nobody knew before
    assert share_table(both).rows[0][1].endswith("cures on fresh seeds")
    assert fresh_table(both).rows[0][2] == "by its study" and fresh_table(both).rows[0][-1] == "decide"
    assert describe_fresh(both) == (
        "1 of the 1 verdicts that were repeated are the same on fresh seeds. "  # norm: it does nothing
        "Fresh seeds decide 1 of the 1 unclear cells that were named beforehand."
    )
    assert "cured by warm (100 %)" in describe_rows(both)[0]
    assert advice_table(both).rows[0][-1].endswith("cures on fresh seeds; 3 seeds")
    assert draw_matrix(both).png.startswith(b"\x89PNG")


def test_surprises(row) -> None:
    recommendations = {"norm": "a paper", "clip": "another"}
    final = loss_by_share(warm=1.0, norm=-0.5, pill__bath=0.9, healthy__warm=0.3)
    names = ("warm", "clip", "norm", "pill", "bath")
    judged = matrix_of(row(final, cures=names, together=[["pill", "bath"]], all=[], recommendations=recommendations))
    found = [(one.kind, one.illness, one.cures) for one in find_surprises(judged)]
    assert found == [
        ("harms", "fever", "norm"),
        ("together only", "fever", "pill + bath"),
        ("not recommended", "fever", "warm"),
        ("recommendation not seen", "fever", "clip"),
        ("recommendation not seen", "fever", "norm"),
        ("side effect", "", "warm"),
    ]
    told = describe_surprises(judged)
    assert told[0].startswith("fever: norm harms, -50 %")
    assert told[1].startswith("fever: pill + bath cures (90 %") and told[1].endswith(
        "no part of it is shown to do so alone."
    )
    assert "though no source names it" in told[2] and "is recommended, and is shown not to work" in told[3]
    assert told[5].startswith("warm harms the healthy model: +0.30")


def test_a_matrix_without_surprises_says_so(row) -> None:
    told = describe_surprises(matrix_of(row(loss_by_share(warm=1.0), recommendations={"warm": "a paper"})))
    assert told == (
        "No cure is shown to harm a sick model by 10% of the damage or more.",
        "No cures are shown to work together only.",
        "No cure is shown to work notably against an illness that no source recommends it for.",
        "No recommended cure is shown to do nothing, or to harm.",
        "No cure is shown to change a healthy model.",
    )
    silent = describe_surprises(matrix_of(row(loss_by_share(warm=1.0))))
    assert silent[-1] == "Recommendations are not declared for fever."
    assert "no source recommends it for" in silent[2]  # what is not declared is no surprise


def test_recommendations_stand_beside_what_is_seen(row) -> None:
    recommendations = {"warm": "a paper", "norm": "another", "clip": "a third"}
    judged = matrix_of(
        row(loss_by_share(warm=1.0, clip=0.6, norm=-0.5), recommendations=recommendations, on_healthy=[])
    )
    assert [cells[1:3] + cells[4:] for cells in recommendation_table(judged).rows] == [
        ("warm", "a paper", "cures", "seen"),
        ("norm", "another", "harms", "not seen"),
        ("clip", "a third", "helps", "seen"),
    ]
    marked = [cell.endswith("†") for cell in share_table(judged).rows[0][1:]]
    assert marked == [True, True, True, False]  # `all` is not one cure
    assert recommendation_table(matrix_of(row(loss_by_share(warm=1.0)))).rows == ()


def test_stable_runs_and_recovery_have_intervals(row, tmp_path: Path) -> None:
    def loss(run: PlannedRun) -> dict[str, Series]:
        """Return a loss with a spike at step 20: the cured model is back after 2, 3 and 4 steps, others never."""
        back = run.seed + 2 if run.arm == "sick__warm" else 99
        values = [1.0 + 0.01 * (step % 2) for step in range(20)] + [9.0 if step < back else 1.0 for step in range(10)]
        return {"train/task_loss": Series(tuple(range(30)), tuple(values))} if run.arm != "healthy" else {}

    usual = loss_by_share(warm=1.0)
    file = write_cures(tmp_path, "fever", ("warm",), design={"on_healthy": []})
    judged = matrix_of(row_of(file, lambda arm, seed: math.inf if arm == "sick" and seed else usual(arm, seed), loss))
    assert stability_table(judged).rows == (
        ("fever", "healthy", "3/3 [0.29, 1.00]", "0 of 3", "–"),
        ("fever", "sick", "1/3 [0.01, 0.91]", "3 of 3", "never in 3 of 3"),
        ("fever", "sick + warm", "3/3 [0.29, 1.00]", "3 of 3", "2.88 [1.21, 6.85]"),
    )
    [cell] = judged.rows[0].cells
    assert cell.outcome.recovery.steps == pytest.approx(math.cbrt(2 * 3 * 4))
    text = json.loads((write_matrix(judged, tmp_path / "out").parent / "matrix.json").read_text())
    assert text["rows"][0]["sick"]["interval"] == pytest.approx([0.0084, 0.9057], abs=1e-4)
    assert text["rows"][0]["cells"][0]["outcome"]["recovery"]["interval"]["low"] == pytest.approx(1.2144, abs=1e-4)


def test_everything_is_written_from_one_record(row, tmp_path: Path) -> None:
    usual = loss_by_share(warm=1.0, clip=0.5, norm=-0.5)
    judged = matrix_of(
        row(usual), row(lambda arm, seed: None if arm == "sick__pill" else usual(arm, seed), "chill", ("pill",))
    )
    folder = tmp_path / "out"
    page = write_matrix(judged, folder).read_text()
    names = {"advice.md", "matrix.html", "matrix.md", "matrix.json", "matrix.png", "matrix_dark.png"}
    assert {file.name for file in folder.iterdir()} == names
    assert "| switch on |" in (folder / "advice.md").read_text()
    assert (folder / "matrix_dark.png").read_bytes() != (folder / "matrix.png").read_bytes()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    markdown = (folder / "matrix.md").read_text()
    for sentence in (*describe_rows(judged), *describe_surprises(judged)):
        assert sentence in markdown
    for table in all_tables(judged):
        assert f"**{table.title}**" in markdown and table.title in page
    record = json.loads((folder / "matrix.json").read_text())
    cell = record["rows"][0]["cells"][0]
    assert cell["label"] == "warm"
    assert cell["effect"]["verdict"] == "cures"
    assert cell["effect"]["share"]["estimate"] == judged.rows[0].cells[0].effect.share.estimate
    assert record["rows"][1]["cells"][0]["effect"] is None
    assert [one["cures"] for one in record["surprises"] if one["kind"] == "harms"] == ["norm"]
    assert record["cures"] == ["warm", "clip", "norm", "pill"]
    assert (folder / "matrix.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("speeds", "cpu", "expected", "shown"),
    [
        ((50.0, 50.0, 50.0), None, (1.0, "wall"), "+100 %"),
        ((50.0, 45.0, 41.0), (2.0, 2.0, 2.0), (100 / 45 - 1, "wall"), "+122 %"),
        ((50.0, 45.0, 39.0), None, None, "–"),
        ((50.0, 45.0, 39.0), (2.2, 2.0, 2.4), (0.1, "CPU"), "+10 % (CPU)"),
        ((50.0, 45.0, 39.0), (2.0, 2.0, 2.6), None, "–"),
    ],
)
def test_times_of_runs_that_shared_a_busy_machine_are_not_compared(
    tmp_path: Path, speeds, cpu, expected: tuple[float, str] | None, shown: str
) -> None:
    """Their CPU times are, where they are known and agree."""

    def series(run: PlannedRun) -> dict[str, Series]:
        is_cured = run.arm == "healthy__warm"
        own = {"throughput/samples_per_second": speeds[run.seed] if is_cured else 100.0}
        if cpu is not None:
            own["throughput/cpu_seconds_per_step"] = cpu[run.seed] if is_cured else 2.0
        return {key: Series((1, 2, 3), (value,) * 3) for key, value in own.items()}

    judged = matrix_of(row_of(write_cures(tmp_path, "fever", ("warm", "clip")), loss_by_share(), series))
    times = {one.cure: one.time for one in judged.side_effects}
    assert times["clip"] == (0.0, "wall")
    assert times["warm"] == (None if expected is None else (pytest.approx(expected[0]), expected[1]))
    assert side_effect_table(judged).rows[1][4] == shown
