"""The matrix by hand: cells, missing and failed runs, side effects, repetition, and what is written of it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_moevlm.study.compare.results import read_finals
from lightning_moevlm.study.matrix.judge_matrix import make_matrix
from lightning_moevlm.study.matrix.records import Matrix, Row
from lightning_moevlm.study.matrix.strongest import find_strongest, repeat
from lightning_moevlm.study.matrix.tables import all_tables, fresh_table, missing_table, share_table
from lightning_moevlm.study.matrix.texts import describe_missing, describe_rows, describe_surprises
from lightning_moevlm.study.matrix.write_matrix import write_matrix
from lightning_moevlm.study.statistics.cures.cure_effect import CureVerdict
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
    shares = {label: cell.effect.share for label, cell in cells.items() if cell.effect}
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
    ranked = sorted(alone, key=lambda arm: alone[arm].p_value or 1.0)
    assert judged[ranked[0]].p_adjusted == pytest.approx(3 * alone[ranked[0]].p_value)  # of three, and not of seven


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
    assert whole is not None and alone["warm"].effect.p_adjusted == pytest.approx(whole.p_adjusted)


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
    stable = {cell.label: cell.effect.stable for cell in fever.cells if cell.effect and cell.kind == "alone"}
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
    assert (str(warm.effect.verdict), warm.time) == ("hurts", 0.0)
    assert warm.effect.mean == pytest.approx(0.4, abs=0.02)
    assert judged.cures[0] == "warm"  # most illnesses have it


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


def test_surprises(row) -> None:
    judged = matrix_of(row(loss_by_share(norm=-0.5, warm__clip=0.9), together=[["warm", "clip"]]))
    told = describe_surprises(judged)
    assert len(told) == 2
    assert told[0].startswith("fever: norm harms, -50 %")
    assert told[1].startswith("fever: warm + clip cures (90 %") and told[1].endswith(
        "no part of it is shown to do so alone."
    )
    none = describe_surprises(matrix_of(row(loss_by_share(warm=1.0))))
    assert none == ("No cure is shown to harm, and none to work together only.",)


def test_everything_is_written_from_one_record(row, tmp_path: Path) -> None:
    usual = loss_by_share(warm=1.0, clip=0.5, norm=-0.5)
    judged = matrix_of(
        row(usual), row(lambda arm, seed: None if arm == "sick__pill" else usual(arm, seed), "chill", ("pill",))
    )
    folder = tmp_path / "out"
    page = write_matrix(judged, folder).read_text()
    assert {file.name for file in folder.iterdir()} == {"matrix.html", "matrix.md", "matrix.json", "matrix.png"}
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
    assert cell["effect"]["share"] == judged.rows[0].cells[0].effect.share
    assert record["rows"][1]["cells"][0]["effect"] is None
    assert record["cures"] == ["warm", "clip", "norm", "pill"]
    assert (folder / "matrix.png").read_bytes().startswith(b"\x89PNG")
