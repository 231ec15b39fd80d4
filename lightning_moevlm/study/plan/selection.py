"""Selects a part of a study's runs, by arm and by seed: `arm=baseline,dense_twin` and `seed=0`.

Values of the same name add up; a run must match every name that is given.
"""

import dataclasses
from collections.abc import Sequence

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.nearest_name import suggest
from lightning_moevlm.study.plan.planned_run import Plan


def select(plan: Plan, only: Sequence[str]) -> Plan:
    """Return the plan with the runs that match, and with their arms alone.

    Args:
        plan: All runs.
        only: Each `arm=NAME[,NAME]` or `seed=NUMBER[,NUMBER]`; an empty list selects all.

    Raises:
        UserError: The study has no such arm or seed.
    """
    allowed = {"arm": [arm.name for arm in plan.comparison.arms], "seed": [str(seed) for seed in plan.comparison.seeds]}
    wanted: dict[str, set[str]] = {}
    for text in only:
        name, _, values = text.partition("=")
        if name not in allowed:
            raise UserError(f"--only {text}: {suggest(name, allowed)}give arm=NAME or seed=NUMBER")
        for value in values.split(","):
            if value not in allowed[name]:
                raise UserError(
                    f"--only {text}: {plan.comparison.name} has no {name} {value!r}; {suggest(value, allowed[name])}"
                    f"choose {', '.join(allowed[name])}"
                )
            wanted.setdefault(name, set()).add(value)
    arms, seeds = (wanted.get(name, set(allowed[name])) for name in ("arm", "seed"))
    runs = tuple(run for run in plan.runs if run.arm in arms and str(run.seed) in seeds)
    part = dataclasses.replace(plan.comparison, arms=tuple(arm for arm in plan.comparison.arms if arm.name in arms))
    return dataclasses.replace(plan, runs=runs, study=dataclasses.replace(plan.study, comparison=part))


def keep_seeds(plan: Plan, only: Sequence[str]) -> Plan:
    """Return the plan as if its study had the selected seeds alone, with every arm.

    Args:
        plan: All runs.
        only: As for `select`; what it says of arms is left aside.

    Raises:
        UserError: The study has no such seed.
    """
    seeds = {run.seed for run in select(plan, [text for text in only if text.startswith("seed=")]).runs}
    part = dataclasses.replace(plan.comparison, seeds=tuple(seed for seed in plan.comparison.seeds if seed in seeds))
    runs = tuple(run for run in plan.runs if run.seed in seeds)
    return dataclasses.replace(plan, runs=runs, study=dataclasses.replace(plan.study, comparison=part))
