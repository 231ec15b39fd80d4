"""Each sign is seen in a recording that shows it, and in no calm one."""

import re

import pytest

from lightning_moevlm.study.forensics.explain import explain
from lightning_moevlm.study.forensics.illnesses import ILLNESSES
from lightning_moevlm.tracking.recordings.recording import Event, RecordedStep, Recording
from tests.conftest import PROJECT

LAYERS = ("backbone.patches", "backbone.blocks.0.attention", "backbone.blocks.1.ffn.text.experts")
AT = 60


def calm(step: int) -> dict[str, float]:
    wiggle = 1 + 0.02 * (step % 3)
    rate = 1e-3 * min(1, step / 50)
    values = {f"gradient_norm/{layer}": wiggle for layer in LAYERS}
    values |= {f"update_norm/{layer}": wiggle * rate for layer in LAYERS}
    places = ("attention_logit/backbone.blocks.0.attention/pair", "router_logit/backbone.blocks.1.ffn.text/text")
    values |= dict.fromkeys((*places, "output_logit/text"), 3 * wiggle)
    values |= {f"load/backbone.blocks.1.ffn.text/text/expert{e}": 0.25 for e in range(4)}
    return values | {"loss/text": 2 * wiggle, "learning_rate": rate, "loss_scale": 1024.0}


def names(changes: dict[str, float], at: int = AT, **options: object) -> list[str]:
    """The illnesses found when these quantities change at a step before step 60, the loss at step 60."""
    keys = options.get("keys", lambda step: {"": ("k",)})
    steps = []
    for number in range(1, AT + 1):
        values = calm(number)
        values |= {name: value for name, value in changes.items() if number >= at}
        values |= {"loss/text": 9.0} if number == AT and options.get("spikes", True) else {}
        steps.append(RecordedStep(number, values, keys(number)))  # type: ignore[operator]
    (explanation,) = explain(Recording((Event(AT, "spike"),), tuple(steps)))
    return [each.illness.name for each in explanation.diagnoses]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention_logit/backbone.blocks.0.attention/pair": 300.0}, "growth of attention logits"),
        ({"router_logit/backbone.blocks.1.ffn.text/text": 90.0}, "growth of router logits"),
        ({"output_logit/text": 200.0}, "drift of output logits"),
        ({"load/backbone.blocks.1.ffn.text/text/expert0": 0.95}, "collapse of experts"),
        ({"gradient_norm/backbone.patches": 50.0}, "spike in the patch embedding"),
        ({"update_norm/backbone.blocks.0.attention": 50.0}, "stale second moments"),
        ({f"gradient_norm/{layer}": 50.0 for layer in LAYERS[1:]}, "growth of gradients in most layers"),
        ({"learning_rate": 0.1}, "jump of the learning rate"),
        ({"loss_scale": 2.0}, "overflow of half precision"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_sign_before_the_spike_is_the_most_likely_illness(changes: dict[str, float], expected: str) -> None:
    assert names(changes, at=AT - 4)[0] == expected


def test_a_batch_is_bad_if_nothing_moved_before() -> None:
    assert names({"gradient_norm/backbone.blocks.0.attention": 50.0})[0] == "a bad batch"
    assert "a bad batch" not in names({"gradient_norm/backbone.blocks.0.attention": 50.0}, at=AT - 2)


def test_an_update_that_follows_its_gradient_is_not_stale() -> None:
    both = {f"{kind}/backbone.blocks.0.attention": 50.0 for kind in ("gradient_norm", "update_norm")}
    assert "stale second moments" not in names(both, at=AT - 2)


def test_an_early_spike_without_warm_up() -> None:
    assert "no or short warm-up" not in names({})
    assert "no or short warm-up" in names({"learning_rate": 1e-3}, at=1)


def test_a_source_that_returns() -> None:
    assert names({}, keys=lambda step: {"a": ("k",), "b": ("l",) if step == AT else ()})[0] == (
        "return of a source after a pause"
    )


def test_a_calm_recording_shows_no_sign() -> None:
    assert names({}, spikes=False) == []


def test_each_row_names_an_option_and_a_source() -> None:
    for illness in ILLNESSES:
        assert illness.switch_on and illness.source, illness.name
    assert len({illness.name for illness in ILLNESSES}) == len(ILLNESSES) == 13


def test_the_guide_of_overlays_has_the_name_of_each_as_a_recording_shows_it() -> None:
    """The guide has every overlay (tests/test_conf.py), so a new one needs a row here or the mark of having none."""
    guide = (PROJECT / "conf/illnesses/README.md").read_text(encoding="utf-8")
    in_guide = dict(re.findall(r"^\| `(\w+)\.yaml` \|.*\| ([^|]+) \|$", guide, flags=re.MULTILINE))
    here = {overlay: illness.name for illness in ILLNESSES for overlay in illness.overlays}
    assert here == {overlay: name for overlay, name in in_guide.items() if name != "–"}
    assert len(here) == sum(len(illness.overlays) for illness in ILLNESSES)
