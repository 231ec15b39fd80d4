"""The sections of history and of other runs: what is said, and records that JSON can hold."""

import json

import numpy as np

from lightning_moevlm.atlas.causal.effects import Effect
from lightning_moevlm.atlas.history.follow import History, Place, Specialised
from lightning_moevlm.atlas.history.history_section import history_section, seeds_section
from lightning_moevlm.atlas.history.matching import match_experts
from lightning_moevlm.atlas.history.settling import settle
from lightning_moevlm.study.statistics.intervals import Interval

PLACE = Place("blocks.1.ffn", "image")


def test_a_history_is_told() -> None:
    course = [np.eye(3, dtype=np.bool_)[[0, 1, 1, 1]], np.eye(3, dtype=np.bool_)[[0, 2, 1, 1]]]
    nmi = {("blocks.1.ffn", "image/category"): (Specialised(10, 0.02, 0.02), Specialised(40, 0.31, 0.02))}
    section = history_section(History((10, 40), {PLACE: settle([10, 40], [course])}, nmi))
    assert section.key == "history" and section.sentences == (
        # three of four choices are made; by chance 1/4 x 1/4 + 3/4 x 2/4 + 0 x 1/4
        "After 10 of 40 steps routers make 75% of their final choices; loads alone give at most 44%.",
        "Between the 2 checkpoints 1 expert was born and 0 died.",
        "NMI of blocks.1.ffn and image/category goes from 0.020 (by chance 0.020) to 0.310 (0.020).",
    )
    routing, specialised = section.tables
    assert routing.rows[1] == ("blocks.1.ffn, image", "40", "1.000", "0.375", "0.250", "3", "birth of 2")
    assert specialised.columns == ("layer", "label", "step 10", "step 40")
    effect = Effect(60, 0.25, Interval(0.2, 0.3, "t"), 1e-9, 2e-9)
    frozen = history_section(History((10, 40), {}, {}), {(10, "blocks.1.ffn"): effect})
    assert frozen.sentences[-1] == (
        "If one layer makes the choices of step 10, the loss changes most in blocks.1.ffn: +0.25 [+0.2, +0.3]."
    )
    assert frozen.tables[-1].rows == (("blocks.1.ffn", "10", "+0.25 [+0.2, +0.3]", "< 0.0001"),)
    records = json.loads(json.dumps(section.records, allow_nan=False))
    assert records["settling"][0]["turns"] == [{"step": 40, "expert": 2, "kind": "birth"}]


def test_other_runs_are_told() -> None:
    expert_T = np.arange(40) // 4 % 3
    chosen_TE = np.eye(3, dtype=np.bool_)[expert_T]
    agreement = match_experts(chosen_TE, chosen_TE[:, [1, 2, 0]], np.arange(40) % 4, draws=19)
    section = seeds_section({"seed1": {PLACE: agreement}})
    assert section.sentences == (
        "Matched to the experts of this run, those of 1 other run repeat 100% of the division of labour beyond loads "
        "and positions.",
    )
    (row,) = section.tables[0].rows
    assert row[:3] == ("seed1", "blocks.1.ffn, image", "1.000") and row[-1] == "100.0%, 0.05"
    assert json.loads(json.dumps(section.records, allow_nan=False))["seed1"][0]["partner"] == [2, 0, 1]
