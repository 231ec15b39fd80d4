"""Illnesses of a training, by the signs that a recording shows: sign -> illness -> what to switch on.

A sign is a rule on the quantities that moved before an event. It suggests an illness; a replay or a study proves it.
A source is cited for what was read of it, in summaries or in full; others say so. A row names the overlays of
conf/illnesses that plant its illness, so that measured cures can be found. An overlay that no row names leaves no sign
in the steps before an event; the table in conf/illnesses/README.md has them all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_moevlm.study.forensics.first_moved import LOOKBACK, Moved
from lightning_moevlm.tracking.recordings.recording import RecordedStep

_EARLY = 100  # steps
_FULL = 0.5  # share of an expert that counts as a collapse


class Evidence(NamedTuple):
    """The last steps up to an event."""

    event_step: int
    moved: Sequence[Moved]
    steps: Sequence[RecordedStep]
    """All recorded ones, oldest first."""

    def first(self, kind: str, up: bool = True) -> Moved | None:
        """Return the first quantity of a kind that moved up or down."""
        return next((one for one in self.moved if one.kind == kind and (one.score > 0) == up), None)


Sign = Callable[[Evidence], tuple[int, str] | None]
"""Returns the step of the sign and what shows it; None if it is not there."""


@dataclass(frozen=True)
class Illness:
    """One row of the table."""

    name: str
    sign: Sign
    switch_on: tuple[str, ...]
    """Options that the literature names against it."""
    source: str
    overlays: tuple[str, ...] = ()
    """Names of files of conf/illnesses, and of the studies of their cures in ablations/cures."""


class Diagnosis(NamedTuple):
    """An illness whose sign a recording shows."""

    illness: Illness
    step: int
    evidence: str


def diagnose(evidence: Evidence) -> list[Diagnosis]:
    """Return the illnesses whose sign is there, most likely first: by the step of the sign, then by the table."""
    found = [(illness, illness.sign(evidence)) for illness in ILLNESSES]
    return sorted(
        (Diagnosis(illness, *sign) for illness, sign in found if sign is not None), key=lambda each: each.step
    )


def _grew(kind: str) -> Sign:
    def sign(evidence: Evidence) -> tuple[int, str] | None:
        moved = evidence.first(kind)
        return None if moved is None else (moved.step, describe_move(moved))

    return sign


def describe_move(moved: Moved) -> str:
    """Return a move as text: the quantity, its usual value and the new one."""
    return f"{moved.quantity}: {moved.past:.3g} -> {moved.value:.3g} ({moved.score:+.1f} deviations)"


def _bad_batch(evidence: Evidence) -> tuple[int, str] | None:
    losses = [one for one in evidence.moved if one.kind == "loss"]
    if not losses or evidence.moved[0].step < evidence.event_step:
        return None
    if any(one.kind.endswith("_logit") and not math.isfinite(one.value) for one in evidence.moved):
        return None  # no input makes logits infinite
    return evidence.event_step, f"nothing moved before this step; {describe_move(losses[0])}"


def _overflow(evidence: Evidence) -> tuple[int, str] | None:
    scale = evidence.first("loss_scale", up=False)
    return None if scale is None else (scale.step, describe_move(scale))


def _patches(evidence: Evidence) -> tuple[int, str] | None:
    gradients = [one for one in evidence.moved if one.kind == "gradient_norm" and one.score > 0]
    if not gradients or ".patches" not in gradients[0].quantity:
        return None
    return gradients[0].step, describe_move(gradients[0])


def _collapse(evidence: Evidence) -> tuple[int, str] | None:
    full = [one for one in evidence.moved if one.kind == "load" and one.score > 0 and one.value >= _FULL]
    return (full[0].step, describe_move(full[0])) if full else None


def _frozen_expert(evidence: Evidence) -> tuple[int, str] | None:
    still = evidence.first("expert_update", up=False)
    return None if still is None else (still.step, describe_move(still))


def _stale_moments(evidence: Evidence) -> tuple[int, str] | None:
    """The update grows while the layer's gradient has not: the second moment is too small for it."""
    gradients = {one.layer: one.step for one in evidence.moved if one.kind == "gradient_norm" and one.score > 0}
    updates = (one for one in evidence.moved if one.kind == "update_norm" and one.score > 0)
    found = next((one for one in updates if gradients.get(one.layer, one.step + 1) > one.step), None)
    return None if found is None else (found.step, describe_move(found))


def _explosion(evidence: Evidence) -> tuple[int, str] | None:
    """Gradients of most layers grow before the event."""
    early = [
        one
        for one in evidence.moved
        if one.kind == "gradient_norm" and one.score > 0 and one.step < evidence.event_step
    ]
    layers = {name for one in evidence.steps[-1:] for name in one.values if name.startswith("gradient_norm/")}
    if 2 * len(early) < max(2, len(layers)):
        return None
    return early[0].step, f"the gradients of {len(early)} of {len(layers)} layers grew; {describe_move(early[0])}"


def _no_warm_up(evidence: Evidence) -> tuple[int, str] | None:
    rates = {one.step: one.values["learning_rate"] for one in evidence.steps if "learning_rate" in one.values}
    if evidence.event_step > _EARLY or 1 not in rates or rates[1] < 0.5 * max(rates.values()):
        return None
    return evidence.event_step, f"step {evidence.event_step} is early, and step 1 had the rate {rates[1]:.3g} already"


def _return_of_a_source(evidence: Evidence) -> tuple[int, str] | None:
    at = next((one for one in evidence.steps if one.step == evidence.event_step), None)
    late = [one for one in evidence.steps if evidence.event_step - LOOKBACK <= one.step < evidence.event_step]
    if at is None or len(late) < LOOKBACK:
        return None
    seen = {source for one in late for source, keys in one.keys.items() if keys}
    new = [source for source, keys in at.keys.items() if keys and source not in seen]
    return (at.step, f"source {', '.join(new)} returned after {LOOKBACK} steps or more without it") if new else None


ILLNESSES: tuple[Illness, ...] = (
    Illness(
        "return of a source after a pause",
        _return_of_a_source,
        ("data.sources.NAME.weight",),
        "the batches of the recording",
        ("modality_drought",),
    ),
    Illness(
        "an expert that does not learn",
        _frozen_expert,
        ("model.trainable", "model.backbone.init_args.moe.init_args.experts"),
        "the updates of the recording",
    ),
    Illness(
        "a bad batch",
        _bad_batch,
        ("model.gradient.skip_spikes", "model.gradient.clip_norm"),
        "PaLM, arXiv 2204.02311: batches skipped; the data alone was not the cause",
        ("noise_images", "repeated_samples", "shuffled_texts"),
    ),
    Illness(
        "jump of the learning rate",
        _grew("learning_rate"),
        ("model.schedule",),
        "the rate of the run, as on a wrong resume",
        ("rate_jump",),
    ),
    Illness(
        "overflow of half precision",
        _overflow,
        ("trainer.precision=bf16-mixed", "model.losses.router_z"),
        "MoE-LLaVA, arXiv 2401.15947: hard to keep stable in 16 bits",
    ),
    Illness(
        "growth of attention logits",
        _grew("attention_logit"),
        (
            "model.backbone.init_args.stabilisers.qk_norm",
            "model.backbone.init_args.stabilisers.logit_cap",
            "model.actions.qk_clip",
        ),
        "arXiv 2309.14322; QK-clip: Kimi K2 report",
        ("attention_logits",),
    ),
    Illness(
        "growth of router logits",
        _grew("router_logit"),
        ("model.losses.router_z", "model.precision.router=float32"),
        "ST-MoE, arXiv 2202.08906: 3 of 3 runs stable with z-loss, 4 of 6 without; Switch, arXiv 2101.03961",
        ("router_logits", "router_rate"),
    ),
    Illness(
        "drift of output logits",
        _grew("output_logit"),
        ("model.losses.output_z",),
        "arXiv 2309.14322; PaLM, arXiv 2204.02311",
    ),
    Illness(
        "collapse of experts",
        _collapse,
        ("model.losses.load_balance", "router: SigmoidBiasRouter"),
        "arXiv 2408.15664; arXiv 1701.06538 (not read)",
        ("expert_collapse",),
    ),
    Illness(
        "spike in the patch embedding",
        _patches,
        ("model.backbone.init_args.stabilisers.freeze_patches",),
        "MoCo v3, arXiv 2104.02057 (not read)",
    ),
    Illness(
        "stale second moments",
        _stale_moments,
        ("model.optimizer=StableAdamW", "a smaller betas[1]", "model.gradient.clip_update"),
        "arXiv 2304.13013, abstract: 1 to 8 steps before a spike",
    ),
    Illness(
        "growth of gradients in most layers",
        _explosion,
        ("model.gradient.clip_norm", "model.gradient.z_clip", "a lower model.optimizer.init_args.lr"),
        "ZClip, arXiv 2504.02507 (its code was read)",
    ),
    Illness(
        "no or short warm-up",
        _no_warm_up,
        ("model.schedule=WarmupCosine", "a longer warmup"),
        "arXiv 2309.14322: longer warm-up lowers the sensitivity to the rate",
        ("no_warmup",),
    ),
)
"""In the order in which illnesses with signs in the same step are named."""
