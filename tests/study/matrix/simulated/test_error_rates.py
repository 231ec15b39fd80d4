"""How often a matrix says something false, and how often its intervals hold the truth: drawn matrices, real verdicts.

`pytest -m slow -s` on this file prints the figures of ablations/README.md. Damages and side effects are judged without
the bootstrap, for time. It only widens intervals, so with it fewer claims are made.
"""

from dataclasses import replace

import numpy as np
import pytest

from lightning_moevlm.study.statistics import effects
from lightning_moevlm.study.statistics.verdict import Rule, Verdict
from tests.study.matrix.simulated.drawn_matrix import (
    MIXED,
    World,
    draw_matrix,
    draw_side_effects,
    find_wrong,
    true_share,
)
from tests.study.matrix.simulated.false_claims import KINDS, Tally, count_false_claims
from tests.study.statistics.test_coverage import error

FAILING = {"rates": (0.0, 0.1, 0.3, 0.5, 0.9), "freedom": 3.0}
WORLDS = {
    "no cure works": {"damages": (40.0,) * 10},
    "no cure works, tails are heavy and runs fail": FAILING,
    "no illness is one": {"damages": (0.0,) * 10},
    "cures differ": {"shares": MIXED},
    "cures differ, tails are heavy and runs fail": {"shares": MIXED, **FAILING},
    "cures differ, a small damage": {"shares": MIXED, "damages": (4.0,) * 10},
    "cures differ, a damage that hardly shows": {"shares": MIXED, "damages": (2.0,) * 10},
}
SMALL = World(5, damages=(4.0, 4.0, 4.0), shares=(0.0,) * 6)


@pytest.fixture(autouse=True)
def without_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "bootstrap_interval", lambda *_: None)


def keeps_its_error(tally: Tally) -> bool:
    """Whether no kind of false claim is more frequent than 5 % and two standard errors."""
    rows = all(tally.in_row[kind] / tally.rows <= 0.05 + 2 * error(tally.rows) for kind in KINDS)
    most = 0.05 + 2 * error(tally.matrices)
    whole = all(tally.standing[kind] / tally.matrices <= most for kind in (*KINDS, "damage"))
    return rows and whole and tally.on_page["damage"] / tally.matrices <= most


def test_a_correction_keeps_the_error_and_none_does_not() -> None:
    """Three illnesses, six cures that do nothing. Without a correction 0.23 of the rows have a false claim."""
    corrected = count_false_claims(SMALL, 40)
    plain = count_false_claims(replace(SMALL, rule=Rule("lower", 0.05, "t", "none")), 40)
    print(corrected, plain, sep="\n")
    assert keeps_its_error(corrected)
    assert not keeps_its_error(plain)


@pytest.mark.slow  # 120 cells of four tests each, 200 times: 10 s of CPU a world
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("world", WORLDS)
def test_a_whole_matrix_keeps_its_error(world: str, seeds: int) -> None:
    """Ten illnesses and twelve cures."""
    tally = count_false_claims(World(seeds, **WORLDS[world]), 200)
    print(f"n={seeds}, {world}: {tally}")
    assert keeps_its_error(tally)


@pytest.mark.slow  # two families of twelve comparisons, 150 times
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_side_effects_keep_the_error_of_each_healthy_model(seeds: int, rate: float) -> None:
    """Twelve cures that do nothing to two healthy models."""
    rng, world, matrices = np.random.default_rng(19), World(seeds, freedom=3.0 if rate else float("inf")), 150
    models = pages = 0
    for _ in range(matrices):
        found = [
            any(one.effect and one.effect.verdict in (Verdict.HELPS, Verdict.HURTS) for one in own.values())
            for own in draw_side_effects(rng, world, 12, rate).by_healthy_model
        ]
        assert len(found) == 2
        models += sum(found)
        pages += any(found)
    print(f"n={seeds}, rate {rate}: false in a model {models / matrices / 2:.4f}, on the page {pages / matrices:.4f}")
    assert models / matrices / 2 <= 0.05 + 2 * error(2 * matrices)


@pytest.mark.slow  # matrices are judged twice
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fresh", [3, 5, 8])
@pytest.mark.parametrize("damage", [4.0, 40.0])
def test_strongest_cells_are_found_again(damage: float, fresh: int) -> None:
    """Cells are chosen by size on five seeds, so their estimates are too large, and fewer seeds show fewer again."""
    rng, world = np.random.default_rng(23), World(5, (damage,) * 10, MIXED)
    cells = [cell for _ in range(60) for _, cell in draw_matrix(rng, world, fresh).repeated]
    agree = np.mean([cell.agrees for cell in cells])
    work = np.mean([cell.agrees or cell.agreement == "differ, both work" for cell in cells])
    wrong = np.mean([find_wrong(cell.effect.verdict, damage, true_share(world, cell)) != "" for cell in cells])
    shares = [(cell.effect.share, cell.fresh.share, true_share(world, cell)) for cell in cells]
    off = np.array([(one.estimate - true, two.estimate - true) for one, two, true in shares if two is not None])
    print(
        f"damage {damage}, {fresh} fresh seeds, {len(cells)} cells: agree {agree:.3f}, or both work {work:.3f}; false "
        f"at first {wrong:.3f}; estimates are off by {off[:, 0].mean():+.3f}, again by {off[:, 1].mean():+.3f}"
    )
    assert wrong <= 0.05
