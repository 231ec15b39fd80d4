"""Groups runs into arms and names the arms."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.flat_config import find_changes, flatten
from lightning_moevlm.common.nearest_name import suggest
from lightning_moevlm.study.plan.run_identity import flatten_without_seeds
from lightning_moevlm.tracking.read.run_selection import name_run
from lightning_moevlm.tracking.read.runs import RunRow

_SEED_IN_NAME = re.compile(r"[-_ ]*seed[-_ =]?\d+$")
_LONGEST_NAME = 40
_SHOWN_KEYS = 2
_MISSING = object()


@dataclass(frozen=True)
class NamedRun:
    """A run of MLflow."""

    row: RunRow
    config: Mapping[str, Any]
    """Nested, from its params; empty without any."""
    seed: int

    def has_config(self, key: str) -> bool:
        """Whether its config has a dotted key."""
        return _found(self.config, key) is not _MISSING

    def value(self, key: str) -> Any:
        """Return the subtree or value of its config at a dotted key, else its tag of that name.

        Raises:
            UserError: It has neither.
        """
        value = _found(self.config, key)
        if value is not _MISSING:
            return value
        if key not in self.row.tags:
            known = [*flatten(self.config), *self.row.tags]
            raise UserError(
                f"--by {key}: run {name_run(self.row)} has no config key and no tag of that name; "
                f"{suggest(key, known)}leave the run out or group by another"
            )
        return self.row.tags[key]


def name_arms(runs: Sequence[NamedRun], by: Sequence[str]) -> dict[str, list[NamedRun]]:
    """Return the runs of each arm by its name, arms in the order of their first runs.

    Args:
        runs: At least one.
        by: Config keys or tags; runs that agree in them are of one arm. Without any the tag `arm` decides; for runs
            without the tag, the whole config without seeds and cosmetic keys.

    Raises:
        UserError: Two runs are of one arm and seed, or one arm's runs are configured differently.
    """
    sweeps = {one.row.tags.get("sweep") for one in runs if "arm" in one.row.tags}
    groups: dict[tuple[str | None, str], list[NamedRun]] = {}
    for one in runs:
        name = _name(one, by, several_sweeps=len(sweeps) > 1)
        groups.setdefault((name, str(flatten_without_seeds(one.config)) if name is None else ""), []).append(one)
    named: dict[str, list[NamedRun]] = {}
    for (given, _), mine in groups.items():
        name = _name_by_difference(mine[0], runs[0]) if given is None else given
        while name in named:
            name = f"{name}'"
        named[name] = mine
        _refuse_unlike(name, mine)
        _refuse_twins(name, mine)
    return named


def key_difference(base: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys in which a config differs from another, with its values; without seeds and cosmetic keys."""
    now = flatten_without_seeds(config)
    different = find_changes(flatten_without_seeds(base), now)
    apart: dict[str, str] = {}
    for key, change in different.items():
        # Where a part takes the place of null or null that of a part, what is there now says it.
        replaced = any(other.startswith(f"{key}.") or key.startswith(f"{other}.") for other in now)
        if change.now is not None or not replaced:
            apart[key] = "absent" if change.now is None else change.now
    return apart


def _name(run: NamedRun, by: Sequence[str], several_sweeps: bool) -> str | None:
    """Return the name of a run's arm; None if its whole config decides."""
    if by:
        return ", ".join(f"{key.split('.')[-1]}={_short(run.value(key))}" for key in by)
    arm = run.row.tags.get("arm")
    if arm is None:
        return None
    return f"{run.row.tags.get('sweep', '')}/{arm}" if several_sweeps else arm


def _name_by_difference(run: NamedRun, first: NamedRun) -> str:
    """Return a name for an arm without one: its differences from the first run, whose arm is named after that."""
    if "arm" not in first.row.tags and (
        run is first or flatten_without_seeds(run.config) == flatten_without_seeds(first.config)
    ):
        return _SEED_IN_NAME.sub("", run.row.name) or run.row.run_id
    apart = key_difference(first.config, run.config)
    if not apart:
        return f"as {name_run(run.row)}"
    words = [f"{key.split('.')[-1]}={_short(value)}" for key, value in list(apart.items())[:_SHOWN_KEYS]]
    more = f" and {len(apart) - _SHOWN_KEYS} more" if len(apart) > _SHOWN_KEYS else ""
    return ", ".join(words) + more


def _short(value: Any) -> str:
    """Return a short text of a value, or of a part of a config by its class and leaves."""
    if isinstance(value, Mapping):
        leaves = flatten(value)
        class_path = leaves.pop("class_path", "").rpartition(".")[2]
        text = " ".join([class_path, *(f"{key.split('.')[-1]}:{text}" for key, text in leaves.items())]).strip()
    else:
        text = value if isinstance(value, str) else flatten({"": value})[""]
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


def _found(config: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return _MISSING
        config = config[part]
    return config


def _refuse_twins(name: str, runs: Sequence[NamedRun]) -> None:
    seen: dict[int, NamedRun] = {}
    for one in runs:
        twin = seen.setdefault(one.seed, one)
        if twin is not one:
            raise UserError(
                f"runs {name_run(twin.row)} and {name_run(one.row)} are both seed {one.seed} of arm {name!r}; an "
                "arm may have one run per seed: leave one out (runs that a study started have the tag role=arm), or "
                "split the arm with --by KEY"
            )


def _refuse_unlike(name: str, runs: Sequence[NamedRun]) -> None:
    for one in runs[1:]:
        apart = key_difference(runs[0].config, one.config)
        if apart:
            raise UserError(
                f"runs {name_run(runs[0].row)} and {name_run(one.row)} are both of arm {name!r} and yet differ in "
                f"{', '.join(apart)}; leave one out, or split the arm with --by KEY"
            )
