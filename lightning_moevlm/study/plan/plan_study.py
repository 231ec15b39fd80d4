"""Plans the runs of a study: arms x seeds, each resolved and checked before the first one starts.

A run's config is the base files, then `all_arms`, then the arm's changes, then the keys that the study sets itself;
later ones win. Its identity is the digest of that config *resolved* (all defaults filled in) without cosmetic keys. So
a changed base, default or arm gives new runs; a new output folder or progress bar does not. Resolving needs the command
line's parser, which lies above this folder; it is handed in as a function.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_moevlm.common.digest import DIGITS
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.declare.arm_changes import overlay
from lightning_moevlm.study.declare.comparison import Arm
from lightning_moevlm.study.declare.study_file import Study
from lightning_moevlm.study.plan.plan_checks import (
    refuse_endless_schedule,
    refuse_idle_seeds,
    refuse_twins,
    refuse_unequal_flops,
)
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun, tracker_tags
from lightning_moevlm.study.plan.run_identity import compute_digest
from lightning_moevlm.study.plan.solve_arms import solve_arms

if TYPE_CHECKING:
    from lightning_moevlm.contracts.model_card import ModelCard

Result = TypeVar("Result")
_STAND_IN = 1_618_033_988  # for a seed: below 2**31, and unlikely in a file

# Both raise UserError. resolve: (config files, overrides) -> nested plain config with all defaults.
Resolve = Callable[[list[Path], dict[str, Any]], dict[str, Any]]
Describe = Callable[[dict[str, Any]], "ModelCard"]


def plan_study(study: Study, resolve: Resolve, describe: Describe, sweeps: Path = Path("runs/sweeps")) -> Plan:
    """Resolve and check every run of a study.

    Args:
        study: As read by `read_study`.
        resolve: Gives the whole config of (config files, overrides).
        describe: Gives the model card of a whole config.
        sweeps: Folder that holds one folder per study.

    Raises:
        UserError: A run does not resolve (names the arm), two arms are the same, seeds change nothing, an arm has
            other active FLOPs than `match` allows, or no number solves it.
    """
    study = solve_arms(study, resolve, describe)
    arms, folder = study.comparison.arms, sweeps / study.comparison.name
    steps = {arm.name: _steps(study, arm, resolve, describe, folder) for arm in arms}
    runs = _plan_runs(study, steps, resolve, folder)
    refuse_twins(study, runs)
    refuse_idle_seeds(study, runs)
    first = {run.arm: run for run in reversed(runs)}
    cards = {arm.name: _in_arm(study, arm, partial(describe, first[arm.name].resolved)) for arm in arms}
    if study.match == "active_flops":
        refuse_unequal_flops(study, cards)
    return Plan(study, folder, runs, cards)


def _steps(study: Study, arm: Arm, resolve: Resolve, describe: Describe, folder: Path) -> int | None:
    """Return the optimiser steps of an arm's runs, or None with a budget of minutes."""
    budget = study.budget
    if budget.minutes is not None:
        return None
    if budget.max_steps is not None:
        return budget.max_steps
    resolved = _resolve_run(study, arm, study.comparison.seeds[0], 1, resolve, folder).resolved
    return _in_arm(study, arm, lambda: budget.steps(resolved, describe(resolved)))


def _plan_runs(study: Study, steps: Mapping[str, int | None], resolve: Resolve, folder: Path) -> tuple[PlannedRun, ...]:
    """Return every run, each arm from one resolved config if only the study's own keys hold the seed.

    One seed is resolved by itself to verify that: of the first arm, and of arms with references of their own.
    """
    seeds, runs = study.comparison.seeds, []
    once = len(seeds) > 1
    for place, arm in enumerate(study.comparison.arms):
        found = _resolve_once(study, arm, steps[arm.name], resolve, folder) if once else []
        if found and (place == 0 or "${" in json.dumps(arm.changes, default=str)):
            last = max(found, key=attrgetter("seed"))
            once = _resolve_run(study, arm, last.seed, steps[arm.name], resolve, folder).digest == last.digest
            found = found if once else []
        runs += found or [_resolve_run(study, arm, seed, steps[arm.name], resolve, folder) for seed in seeds]
    return tuple(runs)


def _resolve_once(study: Study, arm: Arm, steps: int | None, resolve: Resolve, folder: Path) -> list[PlannedRun]:
    """Return an arm's runs, resolved with a stand-in that the seeds then replace; empty if other keys hold it too.

    Resolving takes half a second, and seeds differ by one number.
    """
    seeds = study.comparison.seeds
    overrides = _add_places(_draft(study, arm, seeds[0], steps), folder)
    _set(overrides, "seed_everything", _STAND_IN)
    try:
        resolved = resolve(list(study.base), overrides)
    except UserError:
        return []  # resolving each seed raises it again, with a seed that the author knows
    if steps is None:
        refuse_endless_schedule(study, resolved)
    runs = [_identify(_draft(study, arm, seed, steps), _set_seeds(resolved, seed), folder) for seed in seeds]
    return [] if str(_STAND_IN) in json.dumps(runs[0].resolved, default=str) else runs


def _set_seeds(resolved: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return a copy with the seed in place of the stand-in at the keys that the study owns."""
    config = copy.deepcopy(resolved)
    for section in (config, config.get("data"), config.get("model")):
        for key in ("seed_everything", "seed"):
            if isinstance(section, dict) and section.get(key) == _STAND_IN:
                section[key] = seed
    return config


def _resolve_run(study: Study, arm: Arm, seed: int, steps: int | None, resolve: Resolve, folder: Path) -> PlannedRun:
    # checked with all keys that the child will get, although the digest in some of them is not known yet
    draft = _draft(study, arm, seed, steps)
    resolved = _in_arm(study, arm, lambda: resolve(list(study.base), _add_places(draft, folder)))
    if steps is None:
        refuse_endless_schedule(study, resolved)
    return _identify(draft, resolved, folder)


def _draft(study: Study, arm: Arm, seed: int, steps: int | None) -> PlannedRun:
    overrides = overlay(study.all_arms, arm.changes)
    _set(overrides, "seed_everything", seed)
    _set(overrides, "trainer.max_steps", -1 if steps is None else steps)
    _set(overrides, "trainer.max_epochs", -1)  # an epoch limit of the base must not cut the budget
    if steps is None:
        _set(overrides, "trainer.max_time", study.budget.max_time)
    return PlannedRun(study.comparison.name, arm.name, seed, overrides, {}, digest="0" * DIGITS, max_steps=steps)


def _identify(draft: PlannedRun, resolved: dict[str, Any], folder: Path) -> PlannedRun:
    run = dataclasses.replace(draft, resolved=resolved, digest=compute_digest(resolved))
    return dataclasses.replace(run, overrides=_add_places(run, folder))


def _add_places(run: PlannedRun, folder: Path) -> dict[str, Any]:
    """Return the overrides with the run's folder, name and tags, which are cosmetic."""
    overrides = copy.deepcopy(run.overrides)
    _set(overrides, "trainer.default_root_dir", str(folder / run.folder))
    _set(overrides, "trainer.logger.init_args.experiment_name", run.study)
    _set(overrides, "trainer.logger.init_args.run_name", run.name)
    _set(overrides, "trainer.logger.init_args.tags", tracker_tags(run))
    return overrides


def _in_arm(study: Study, arm: Arm, work: Callable[[], Result]) -> Result:
    try:
        return work()
    except UserError as error:
        raise UserError(f"{study.file}:{arm.line}: arm {arm.name!r}: {error}") from error


def _set(config: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        config = config.setdefault(part, {})
    config[last] = value
