"""Solves the option that an arm leaves open: the multiple at which the arm costs as much as the baseline.

Active FLOPs do not fall as a width grows, so the multiple is found by bisection over models that are built without
memory. The arm then says the number as if its author had written it: it is in the plan, the configuration and the
digest of each run.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.declare.arm_changes import overlay
from lightning_moevlm.study.declare.comparison import Arm, Comparison, Solve
from lightning_moevlm.study.declare.study_file import Study
from lightning_moevlm.study.plan.plan_checks import FLOPS_TOLERANCE

if TYPE_CHECKING:
    from lightning_moevlm.contracts.model_card import ModelCard

_MOST = 2**16  # multiples that are tried


@dataclasses.dataclass(frozen=True)
class Solved:
    """The number that was found for an arm."""

    key: str
    number: int
    multiple_of: int
    ratio: float | None  # the arm's active FLOPs over the baseline's; None: not known here

    def describe(self, arm: str, baseline: str) -> str:
        """Return the number in a sentence for people."""
        reached = "" if self.ratio is None else f" It reaches {self.ratio:.4f} times the active FLOPs of {baseline}."
        return f"{arm}: {self.key} = {self.number} was solved, a multiple of {self.multiple_of}.{reached}"


def list_solved(comparison: Comparison, cards: "Mapping[str, ModelCard | None]") -> dict[str, Solved]:
    """Return what was found for the arms of a plan, by arm."""
    base = cards.get(comparison.baseline)
    found = {}
    for arm in comparison.arms:
        if arm.solve is not None and arm.solved is not None:
            card = cards.get(arm.name)
            ratio = card.active_flops_per_sample / base.active_flops_per_sample if card and base else None
            found[arm.name] = Solved(arm.solve.key, arm.solved, arm.solve.multiple_of, ratio)
    return found


def describe_solved(comparison: Comparison, cards: "Mapping[str, ModelCard | None]") -> tuple[str, ...]:
    """Return a sentence for each arm that a number was found for."""
    found = list_solved(comparison, cards)
    return tuple(solved.describe(arm, comparison.baseline) for arm, solved in found.items())


def solve_arms(
    study: Study,
    resolve: Callable[[list[Path], dict[str, Any]], dict[str, Any]],
    describe: "Callable[[dict[str, Any]], ModelCard]",
) -> Study:
    """Return the study with the number in the changes of every arm that leaves one open.

    Raises:
        UserError: The option is not a whole number, or no multiple brings the arm within the tolerance.
    """
    if all(arm.solve is None for arm in study.comparison.arms):
        return study
    baseline = next(arm for arm in study.comparison.arms if arm.name == study.comparison.baseline)
    wanted = describe(_resolve(study, baseline, resolve)).active_flops_per_sample
    arms = []
    for arm in study.comparison.arms:
        if arm.solve is not None:
            try:
                resolved = _resolve(study, arm, resolve)
                number = _find_multiple(arm.solve, resolved, wanted, describe)
            except UserError as error:
                raise UserError(f"{study.file}:{arm.line}: arm {arm.name!r}: {error}") from error
            changes = _write(arm.changes, study.all_arms, arm.solve.key, number)
            arm = dataclasses.replace(arm, changes=changes, solved=number)
        arms.append(arm)
    return dataclasses.replace(study, comparison=dataclasses.replace(study.comparison, arms=tuple(arms)))


def _resolve(study: Study, arm: Arm, resolve: Callable[[list[Path], dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    return resolve(list(study.base), overlay(study.all_arms, arm.changes))


def _find_multiple(
    solve: Solve, resolved: dict[str, Any], wanted: int, describe: "Callable[[dict[str, Any]], ModelCard]"
) -> int:
    """Return the multiple whose active FLOPs are nearest to those wanted."""
    known: dict[int, int] = {}

    def flops(times: int) -> int:
        if times not in known:
            number = times * solve.multiple_of
            try:
                known[times] = describe(_set(resolved, solve.key, number)).active_flops_per_sample
            except UserError as error:
                raise UserError(
                    f"solve tried {solve.key} = {number}, which was refused ({error}); choose a multiple_of whose "
                    "multiples are all allowed, or solve another key"
                ) from error
        return known[times]

    _set(resolved, solve.key, solve.multiple_of)  # refuses a key that cannot be solved
    low, high = 1, 2
    if flops(low) == flops(high):
        raise UserError(f"solve: {solve.key} does not change the arm's active FLOPs; solve another key")
    while flops(high) < wanted:
        if high == _MOST:
            raise UserError(
                f"solve: at {solve.key} = {high * solve.multiple_of} active FLOPs are still below the baseline's "
                f"{wanted:,}; solve another key"
            )
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if flops(middle) < wanted else (low, middle)
    best = min((low, high), key=lambda times: abs(flops(times) - wanted))
    ratio = flops(best) / wanted
    if abs(ratio - 1) > FLOPS_TOLERANCE:
        raise UserError(
            f"solve: no multiple of {solve.multiple_of} for {solve.key} brings active FLOPs within 1 % of the "
            f"baseline's {wanted:,}; the nearest, {best * solve.multiple_of}, has {ratio:.3f} times as many. Choose a "
            "smaller multiple_of, or solve another key"
        )
    return best * solve.multiple_of


def _set(resolved: dict[str, Any], key: str, number: int) -> dict[str, Any]:
    """Return a copy with the option set; as in the rest of a study file, `init_args` may be left out of the key."""
    config = copy.deepcopy(resolved)
    here: Any = config
    *path, last = _split(key)
    for part in path:
        here = _options(here.get(part))
    value = here.get(last)
    if not isinstance(value, int) or isinstance(value, bool):
        told = f"is {value!r}" if last in here else "is not an option"
        raise UserError(f"solve: {key} {told} in this arm; give the key of an option that is a whole number")
    here[last] = number
    return config


def _write(changes: dict[str, Any], all_arms: dict[str, Any], key: str, number: int) -> dict[str, Any]:
    """Return changes with the number, `init_args` spelled as these changes spell it: a parser refuses a mixture."""
    written = copy.deepcopy(changes)
    here, below = written, all_arms
    *path, last = _split(key)
    for part in path:
        here, below = _open(here, below)
        if isinstance(here.get(part), str):
            here[part] = {"class_path": here[part]}
        here, below = here.setdefault(part, {}), below.get(part, {})
    here, _ = _open(here, below)
    here[last] = number
    return written


def _open(here: dict[str, Any], below: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return where the options of a part are written, in an arm and in what lies below it."""
    below = below if isinstance(below, dict) else {}
    if "class_path" in here or "init_args" in here or "init_args" in below:
        return here.setdefault("init_args", {}), below.get("init_args", {})
    return here, below


def _split(key: str) -> list[str]:
    return [part for part in key.split(".") if part != "init_args"]


def _options(part: Any) -> dict[str, Any]:
    """Return the options of a part of a configuration; none of a plain value."""
    inner = part.get("init_args") if isinstance(part, Mapping) and "class_path" in part else part
    return inner if isinstance(inner, dict) else {}
