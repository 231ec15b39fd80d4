"""A planted specialist: its removal hurts the samples of its category and no others."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_moevlm.atlas.causal.examine import To, examine
from lightning_moevlm.atlas.causal.groups import EVERY, group_samples
from lightning_moevlm.atlas.causal.roles import Expert, Need, Serves
from lightning_moevlm.atlas.labels.label_tokens import LabelReader
from lightning_moevlm.atlas.make_atlas import TRACE_FILE, make_atlas
from lightning_moevlm.atlas.probe.probe_set import ProbeSet
from lightning_moevlm.atlas.routing.route import route
from lightning_moevlm.atlas.routing.trace import Trace, TraceWriter
from lightning_moevlm.model.objectives import Draws, MaskedModelling
from tests.atlas.causal.test_scores import Remember
from tests.atlas.observed import NUM_EXPERTS, PlantedRouter, open_data, small_model, tokens_of


@pytest.mark.parametrize("to", ["nothing", "next"])
def test_a_planted_specialist_is_needed_for_its_category(to: To, many_scenes: Path, tmp_path: Path) -> None:
    data = open_data(many_scenes)
    planted = tokens_of(data, "fruit")
    model = small_model(partial(PlantedRouter, planted=planted)).eval()
    probe = ProbeSet(data, "train", 120, 0)
    atlas = make_atlas(model, MaskedModelling(model.spec), probe, tmp_path, draws=19)
    trace = Trace(tmp_path / TRACE_FILE)
    groups = group_samples(trace, atlas.names)
    assert groups[EVERY].all() and {"category fruit", "category animal"} < groups.keys()
    # other words may begin with a planted token too
    words = [text_L for each in probe.batches() if each.batch.text_BL is not None for text_L in each.batch.text_BL]
    is_planted_N = np.array([bool(torch.isin(text_L, torch.tensor(sorted(planted))).any()) for text_L in words])
    assert is_planted_N.sum() >= groups["category fruit"].sum() > 8
    layer = atlas.layers[-1].layer  # the last one: nothing after it spreads a change
    observed = tuple(Serves(Expert(layer, expert), "category fruit", 3.0) for expert in (0, 1))
    found = examine(
        model, Remember(model).eval(), Draws(0), probe, atlas.layers[-1:], {
            EVERY: groups[EVERY], "category fruit": groups["category fruit"], "spared": ~is_planted_N,
        }, observed, to,
    )  # fmt: skip
    assert found.num_samples == 120 and len(found.effects) == NUM_EXPERTS
    on = {each.group: each for each in found.effects[Expert(layer, 0)]}
    assert on["category fruit"].loss.p_adjusted < 0.001 and on["category fruit"].loss.mean > 0
    assert on["spared"].loss.mean == 0 and on["spared"].loss.p == 1
    specialist, other = found.claims
    assert specialist.need is Need.SPECIFIC and other.need is not Need.SPECIFIC
    assert [each.group for each in next(r for r in found.roles if r.expert == Expert(layer, 0)).needed_for] == [
        "category fruit"
    ]
    assert {each.change for each in found.layers} == {
        "best expert left out", "random experts", "experts of another sample", "hashed experts",
    }  # fmt: skip
    assert all(each.loss.mean > 0 for each in found.layers)


@pytest.mark.slow(reason="twenty probes")
@pytest.mark.timeout(3600)
def test_removal_confirms_a_planted_specialist_in_twenty_seeds(many_scenes: Path, tmp_path: Path) -> None:
    data = open_data(many_scenes)
    model = small_model(partial(PlantedRouter, planted=tokens_of(data, "fruit"))).eval()
    for seed in range(20):
        probe = ProbeSet(data, "train", 150, seed)
        reader = LabelReader(model, probe.tokenizer)
        with TraceWriter(tmp_path / str(seed)) as writer:
            for routed in route(model, MaskedModelling(model.spec), probe, reader):
                writer.add(routed)
        trace = Trace(tmp_path / str(seed))
        names = {name: values.names for name, values in reader.values.items()}
        groups = group_samples(trace, names, ["category fruit"])
        chosen = {EVERY: groups[EVERY], "category fruit": groups["category fruit"]}
        last = trace.layers[-1:]
        observed = (Serves(Expert(last[0].layer, 0), "category fruit", 3.0),)
        found = examine(model, Remember(model).eval(), Draws(0), probe, last, chosen, observed, "nothing")
        (specialist,) = found.claims
        assert specialist.need is Need.SPECIFIC and specialist.effect is not None, seed
        assert specialist.effect.loss.p_adjusted < 0.001, seed


def test_groups_are_of_samples(many_scenes: Path, tmp_path: Path) -> None:
    data = open_data(many_scenes)
    model = small_model(partial(PlantedRouter, planted=frozenset({5}))).eval()
    probe = ProbeSet(data, "train", 150, 0)
    atlas = make_atlas(model, MaskedModelling(model.spec), probe, tmp_path, draws=19)
    trace = Trace(tmp_path / TRACE_FILE)
    groups = group_samples(trace, atlas.names)
    expected = [
        any(each["category"] == "fruit" for each in annotation["objects"])
        for batch in probe.batches()
        for annotation in batch.annotations
    ]
    if "category fruit" in groups:
        assert np.array_equal(groups["category fruit"], expected)
    words = {name for name in groups if name.startswith("word ")}
    assert len(words) == 12 and not any(name.startswith("position") for name in groups)
    more = {name for value in atlas.names["text/word"] if (name := f"word {value}")}
    assert words < {name for name in group_samples(trace, atlas.names, more) if name.startswith("word ")}
    assert not any(name.startswith(("source", "modality")) for name in groups), "of one set of pairs there is one kind"
    assert all(8 <= member_N.sum() <= 142 for name, member_N in groups.items() if name != EVERY)
