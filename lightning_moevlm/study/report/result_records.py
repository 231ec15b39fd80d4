"""Results as JSON records: `sweep report --json` and the report's folder hold them.

A record has the fields of the result records (`compare.results`, `statistics`), where their meanings and units stand.
JSON knows no infinite number: it becomes null.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from lightning_moevlm.study.compare.results import ArmResult, StudyResult
from lightning_moevlm.study.plan.solve_arms import list_solved

Records = Literal["arms", "factors", "learning_rates", "claims", "fairness"]
RECORDS_FILES: dict[Records, str] = {
    "arms": "report.json",
    "factors": "factors.json",
    "learning_rates": "learning_rates.json",
    "claims": "claims.json",
    "fairness": "fairness.json",
}


def make_records(result: StudyResult) -> dict[Records, list[dict[str, Any]]]:
    """Return the records of each kind: arms, factors and interactions, ladders, published claims, unlike runs."""
    study = {"study": result.comparison.name, "metric": result.comparison.primary.metric}
    solved = list_solved(result.comparison, {arm.arm.name: arm.card for arm in result.arms})
    return {
        "arms": [study | _arm_record(arm) | {"solved": to_json(solved.get(arm.arm.name))} for arm in result.arms],
        "factors": [study | {"name": one.name, "note": one.effect.note} | to_json(one) for one in result.factors],
        "learning_rates": [study | {"name": one.ladder.name} | to_json(one) for one in result.ladders],
        "claims": [study | {"name": one.claim.name, "note": one.effect.note} | to_json(one) for one in result.claims],
        "fairness": [study | to_json(one) for one in result.unlike],
    }


def _arm_record(arm: ArmResult) -> dict[str, Any]:
    """Return an arm without its runs: of these hold series and configurations, which MLflow has."""
    numbers = {name: value for name, value in vars(arm).items() if name not in ("arm", "runs")}
    note, guards = (arm.effect.note, arm.effect.guards) if arm.effect else ("", ())
    broken = [guard.metric for guard in guards if guard.is_broken]
    named = {"arm": arm.arm.name, "verdict": str(arm.verdict), "note": note, "broken_guards": broken}
    return named | to_json(numbers)


def to_json(value: Any) -> Any:
    """Return a record, with all that it holds, as plain data for JSON."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return to_json(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): to_json(one) for key, one in value.items()}
    if isinstance(value, tuple | frozenset):
        return [to_json(one) for one in (value if isinstance(value, tuple) else sorted(value))]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, str) else value
