"""Refuses plans that cannot answer the question: equal arms, idle seeds, unequal compute, schedules without an end."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.declare.designs.cures import HEALTHY
from lightning_moevlm.study.declare.study_file import Study
from lightning_moevlm.study.plan.planned_run import PlannedRun
from lightning_moevlm.study.plan.run_identity import compute_digest

if TYPE_CHECKING:
    from lightning_moevlm.contracts.model_card import ModelCard


def refuse_twins(study: Study, runs: tuple[PlannedRun, ...]) -> None:
    """Refuse two arms, or two seeds of an arm, that resolve to the same run."""
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        twin = seen.setdefault(run.digest, run)
        if twin is not run and twin.arm != run.arm:
            design = study.comparison.design
            is_optional = design is not None and design.cure_study is not None and run.arm.startswith(HEALTHY)
            raise UserError(
                f"{study.file}: arms {twin.arm!r} and {run.arm!r} are the same run (digest {run.digest}): "
                f"{run.arm!r} sets nothing that differs; change a value or "
                + ("leave the cure out of `on_healthy`" if is_optional else "remove the arm")
            )
        if twin is not run:
            raise UserError(
                f"{study.file}: seeds {twin.seed} and {run.seed} of arm {run.arm!r} resolve to one config: "
                "seed_everything has no effect on it; remove what fixes the seed in the base"
            )


def refuse_idle_seeds(study: Study, runs: tuple[PlannedRun, ...]) -> None:
    """Refuse seeds without effect: weights, masks and data order come from other keys than seed_everything."""
    seen: dict[tuple[str, str], PlannedRun] = {}
    for run in runs:
        rest = compute_digest({key: value for key, value in run.resolved.items() if key != "seed_everything"})
        twin = seen.setdefault((run.arm, rest), run)
        if twin is not run:
            raise UserError(
                f"{study.file}: seeds {twin.seed} and {run.seed} of arm {run.arm!r} differ in seed_everything alone, "
                "which nothing follows, so both give the same run; set `data.seed: ${seed_everything}` and "
                "`model.seed: ${seed_everything}` in the base"
            )


def refuse_unequal_flops(study: Study, cards: "Mapping[str, ModelCard]") -> None:
    """Refuse arms whose models compute more or less than the baseline's."""
    baseline = study.comparison.baseline
    wanted = cards[baseline].active_flops_per_sample
    for arm in study.comparison.arms:
        flops = cards[arm.name].active_flops_per_sample
        if abs(flops - wanted) > FLOPS_TOLERANCE * wanted:
            raise UserError(
                f"{study.file}:{arm.line}: arm {arm.name!r} has {flops:,} active FLOPs per sample, "
                f"{100 * (flops / wanted - 1):+.3g} % against the {wanted:,} of {baseline!r}, and `match: "
                "active_flops` allows 1 %; change hidden_dim, top_k or the number of blocks of one of them, let "
                "`solve` find a number, or remove `match`"
            )


def refuse_endless_schedule(study: Study, resolved: Mapping[str, Any]) -> None:
    """Refuse a schedule whose length is the number of steps, which a budget of minutes leaves open."""
    model = resolved.get("model")
    schedule = model.get("schedule") if isinstance(model, dict) else None
    options = schedule.get("init_args") if isinstance(schedule, dict) else None
    if isinstance(options, dict) and options.get("total_steps") == -1:
        raise UserError(
            f"{study.file}: with a budget of minutes the number of steps is unknown, and the schedule follows "
            "trainer.max_steps; set `model.schedule.init_args.total_steps` to a number in the base"
        )


FLOPS_TOLERANCE = 0.01
"""Relative difference up to which active FLOPs count as equal."""
