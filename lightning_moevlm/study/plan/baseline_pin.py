"""Checks `baseline_digest`: a study that pins its baseline is refused once the baseline resolves to something else.

A study depends on base files, on defaults, and often on the baseline of an earlier study. Its pin is the digest of the
baseline's resolved config without nulls, seeds, cosmetic keys and the keys that each study sets itself (budget, logger,
output folder). So studies of other lengths and seeds share it. `sweep plan` prints it. A baseline that has run is kept
beside the study's runs under its digest; from there an error lists the keys that have changed since.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from lightning_moevlm.common.atomic_files import write_atomically
from lightning_moevlm.common.digest import digest_text
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.flat_config import find_changes
from lightning_moevlm.study.declare.arm_changes import OWNED
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.plan.run_identity import flatten_without_seeds

_FOLDER = "baselines"
_SCHEDULE_STEPS = "model.schedule.init_args.total_steps"  # as a rule it follows the budget
_SHOWN_KEYS = 6


def baseline_digest(plan: Plan) -> str | None:
    """Return the digest to pin, 12 hex digits; None if the plan is a part without the baseline."""
    leaves = _baseline(plan)
    return None if leaves is None else _digest(leaves)


def refuse_other_baseline(plan: Plan) -> None:
    """Refuse a study whose baseline is not the pinned one.

    Raises:
        UserError: Names file, line, both digests, and the changes if the pinned baseline is known.
    """
    pin, leaves = plan.study.pin, _baseline(plan)
    if pin is None or leaves is None or pin.digest == (now := _digest(leaves)):
        return
    raise UserError(
        f"{plan.study.file}:{pin.line}: baseline_digest is {pin.digest}, but the baseline {plan.comparison.baseline!r} "
        f"resolves to {now}. Changed keys: {_describe_changes(plan, pin.digest, leaves)}. To accept the change: "
        f"`baseline_digest: '{now}'`"
    )


def keep_baseline(plan: Plan) -> None:
    """Keep the baseline's config under its digest, so that an error can list the changes."""
    leaves = _baseline(plan)
    if leaves is not None:
        write_atomically(plan.folder / _FOLDER / f"{_digest(leaves)}.json", json.dumps(leaves, indent=1) + "\n")


def _baseline(plan: Plan) -> dict[str, str] | None:
    run = next((run for run in plan.runs if run.arm == plan.comparison.baseline), None)
    if run is None:
        return None
    leaves = flatten_without_seeds(run.resolved)
    if leaves.get(_SCHEDULE_STEPS) == leaves.get("trainer.max_steps"):
        leaves.pop(_SCHEDULE_STEPS, None)
    return _drop_nulls(
        {k: v for k, v in leaves.items() if not any(k == own or k.startswith(f"{own}.") for own in OWNED)}
    )


def _drop_nulls(leaves: Mapping[str, str]) -> dict[str, str]:
    """Leave out what is off: an option that is added later and off does not make another baseline."""
    return {key: value for key, value in leaves.items() if value != "null"}


def _digest(leaves: Mapping[str, str]) -> str:
    return digest_text(json.dumps(leaves, sort_keys=True))


def _describe_changes(plan: Plan, pinned: str, now: Mapping[str, str]) -> str:
    before = _find_baseline(plan.folder.parent, pinned)
    if before is None:
        files = ", ".join(map(str, plan.study.base))
        return (
            f"unknown (no study below {plan.folder.parent} has run with the pinned one); see the git history of "
            f"{files} and the package version"
        )
    changes = find_changes(_drop_nulls(before), now)
    if not changes:
        return "none; the pin counted keys that are null, which are now left out"
    lines = [f"{key} was {one.base or 'unset'}, is {one.now or 'unset'}" for key, one in changes.items()]
    more = f" and {len(lines) - _SHOWN_KEYS} more keys" if len(lines) > _SHOWN_KEYS else ""
    return "; ".join(lines[:_SHOWN_KEYS]) + more


def _find_baseline(sweeps: Path, digest: str) -> dict[str, str] | None:
    """Return a baseline that any study has kept; a damaged file, which does not match its name, is skipped."""
    for file in sorted(sweeps.glob(f"*/{_FOLDER}/{digest}.json")):
        try:
            leaves = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(leaves, dict) and _digest(leaves) == digest:
            return leaves
    return None
