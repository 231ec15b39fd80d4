"""The section of needs: what is said, and records that JSON can hold."""

import json
from dataclasses import replace

from lightning_moevlm.atlas.causal.causal_section import causal_section
from lightning_moevlm.atlas.causal.examine import Examination, LayerChange
from lightning_moevlm.atlas.causal.roles import Serves, examine_claims, rank_roles
from tests.atlas.causal.test_roles import EFFECTS, FIRST, SECOND, effect


def test_needs_are_told() -> None:
    effects = {expert: tuple(found) for expert, found in EFFECTS.items()}
    observed = [Serves(FIRST, "category apple", 3.2), Serves(SECOND, "category apple", 2.0)]
    found = Examination(
        "next",
        60,
        {"all": 60, "category apple": 42, "category dog": 12},
        effects,
        (LayerChange("blocks.1.ffn", "random experts", effect(0.4, 1e-9), {"text": effect(-0.1, 1e-4)}),),
        rank_roles(effects, observed, "all"),
        examine_claims(observed, effects),
    )
    section = causal_section(found)
    assert section.sentences[:4] == (
        "Each of 2 experts was switched off on 60 samples, and its tokens went to the next-ranked expert; p is "
        "corrected by Holm over 5 tests of experts and groups.",
        "Experts whose removal raises the loss of all samples: 1 of 2. Experts that are needed for a group of samples "
        "that they serve: 1.",
        "Expert 3 of blocks.1.ffn is needed for category apple (+0.3 [+0.29, +0.31]).",
        "Observed preferences for groups of samples: 2. needed for it: 1, needed, not specific: 0, not seen: 1, "
        "not tested: 0.",
    )
    assert "and they need it" in section.sentences[4]
    assert "its removal is not seen to hurt them" in section.sentences[5]
    experts, claims, layers = section.tables
    assert experts.rows[0] == (
        "expert 3 of blocks.1.ffn", "+0.1 [+0.09, +0.11]", "0.0001", "category apple +0.29 [+0.28, +0.3]", "–",
    )  # fmt: skip
    assert [row[3] for row in claims.rows] == ["needed for it", "not seen"]
    assert layers.columns[-1] == "right text" and layers.rows[0][-1] == "-0.1 [-0.11, -0.09]"
    records = json.loads(json.dumps(section.records, allow_nan=False))
    assert records["ranking"] == [["blocks.1.ffn", 3], ["blocks.1.ffn", 5]]
    first = records["experts"][1]
    assert (
        first["hurts"] == []
        and first["needed_for"] == ["category apple"]
        and records["columns"][:4] == ["samples", "mean", "low", "high"]
    )
    assert first["effects"]["category apple"]["loss"] == [42, 0.3, 0.29, 0.31, 1e-6, 1e-6]
    assert records["layers"][0]["loss"]["mean"] == 0.4
    unserved = causal_section(replace(found, roles=rank_roles(effects, (), "all")))
    assert "needed for a group of samples that they serve: 0." in unserved.sentences[1]
    assert unserved.sentences[3].startswith("Removals that hurt a group more than the other samples, though the expert")
    assert unserved.tables[0].rows[0][3:] == ("–", "category apple +0.29 [+0.28, +0.3]")
    assert unserved.records["experts"][1]["hurts"] == ["category apple"]
