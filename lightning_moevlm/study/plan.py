"""From a study to its runs: arms x seeds, every one resolved and checked before the first one starts.

A run's config is the base files, over them `all_arms`, over these what the arm changes, and last what the study sets
itself. Its identity is the digest of that config *resolved* (all defaults filled in) without cosmetic keys. So a
changed base, a changed default and a changed arm give new runs, while a new output folder or progress bar does not.
Resolving needs the command line's parser, which lies above this folder; it is handed in as a function.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lightning_moevlm.errors import UserError
from lightning_moevlm.shipped import find_file
from lightning_moevlm.study.changes import overlaid
from lightning_moevlm.study.comparison import Arm, Comparison
from lightning_moevlm.study.digest import DIGITS, digest_of_text
from lightning_moevlm.study.seed_keys import MARK, Key, follow_plainly, marked_keys, with_seed
from lightning_moevlm.study.spec import Study
from lightning_moevlm.tracking.config_diff import flat as spelled

if TYPE_CHECKING:  # it lies beside the models, which import torch
    from lightning_moevlm.models.card import ModelCard


Result = TypeVar("Result")

# Both raise UserError. resolve: (config files, overrides) -> nested plain config with all defaults.
Resolve = Callable[[list[Path], dict[str, Any]], dict[str, Any]]
Describe = Callable[[dict[str, Any]], "ModelCard"]


class Cosmetic(NamedTuple):
    """A dotted prefix (or, for callbacks, the end of a class path) that does not change what a run learns."""

    name: str
    reason: str


FLOPS_TOLERANCE = 0.01
"""Share by which active FLOPs may differ and be called equal."""
_OURS = f"{__name__.partition('.')[0]}."  # how the paths of this package's classes begin
_SEEDS = ("seed", "seed_everything")  # the last part of the keys that hold one

COSMETIC_KEYS: tuple[Cosmetic, ...] = (
    Cosmetic("config", "names of config files; what they say is resolved already"),
    Cosmetic("trainer.logger", "where results are written"),
    Cosmetic("trainer.default_root_dir", "where files are written"),
    Cosmetic("trainer.enable_progress_bar", "terminal output"),
    Cosmetic("trainer.enable_model_summary", "terminal output"),
    Cosmetic("data.cache_dir", "where downloads are kept"),
    Cosmetic("data.cache_gib", "how many downloads are kept"),
    Cosmetic("data.allowed_protocols", "what is refused"),
)
COSMETIC_CALLBACKS: tuple[Cosmetic, ...] = (
    Cosmetic("ProgressBar", "terminal output"),
    Cosmetic("StepProgress", "terminal output"),
    Cosmetic("ResultTable", "terminal output"),
    Cosmetic("ModelSummary", "terminal output"),
)


@dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed.

    overrides: nested config that goes over the base; resolved: the whole config, for reading only (what is cosmetic may
    be another seed's); digest: identity, 12 hex digits; max_steps: optimiser steps, None where the clock ends the
    run.
    """

    study: str
    arm: str
    seed: int
    overrides: dict[str, Any]
    resolved: dict[str, Any]
    digest: str
    max_steps: int | None

    @property
    def name(self) -> str:
        """Name in the tracker and in tables."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def folder(self) -> str:
        """Name of its folder; a changed config gets a new one."""
        return f"{self.name}-{self.digest}"


@dataclass(frozen=True)
class Plan:
    """Every run of a study, seeds innermost, and the model card of each arm."""

    study: Study
    folder: Path
    runs: tuple[PlannedRun, ...]
    cards: "dict[str, ModelCard]"

    @property
    def comparison(self) -> Comparison:
        """What the study compares."""
        return self.study.comparison

    def run_folder(self, run: PlannedRun) -> Path:
        """Where a run keeps its state, log and checkpoints."""
        return self.folder / run.folder


def plan_study(study: Study, resolve: Resolve, describe: Describe, sweeps: Path = Path("runs/sweeps")) -> Plan:
    """Resolve and check every run of a study.

    Args:
        study: As read by `read_study`.
        resolve: Gives the whole config of (config files, overrides).
        describe: Gives the model card of a whole config.
        sweeps: Folder that holds one folder per study.

    Raises:
        UserError: where a run does not resolve (names the arm), two arms are the same, seeds change nothing, or an arm
            differs in what it must share with the baseline.
    """
    arms, folder = study.comparison.arms, sweeps / study.comparison.name
    steps = {arm.name: _steps(study, arm, resolve, describe, folder) for arm in arms}
    proven: set[frozenset[Key]] = set()
    runs = tuple(run for arm in arms for run in _of_arm(study, arm, steps[arm.name], resolve, folder, proven))
    _refuse_twins(study, runs)
    _refuse_idle_seeds(study, runs)
    first = {run.arm: run for run in reversed(runs)}
    cards = {arm.name: _in_arm(study, arm, partial(describe, first[arm.name].resolved)) for arm in arms}
    if study.match == "active_flops":
        _refuse_unequal_flops(study, cards)
    return Plan(study, folder, runs, cards)


def digest_of(resolved: Mapping[str, Any]) -> str:
    """Return the first 12 hex digits of the SHA-256 of the config's canonical JSON, cosmetic keys left out."""
    text = json.dumps(essential(resolved), sort_keys=True, separators=(",", ":"), default=_path_as_text)
    return digest_of_text(text)


def essential(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the config without cosmetic keys, classes of this package by their short names."""
    rest = copy.deepcopy(dict(resolved))
    for cosmetic in COSMETIC_KEYS:
        _remove(rest, cosmetic.name.split("."))
    trainer = rest.get("trainer")
    if isinstance(trainer, dict) and isinstance(trainer.get("callbacks"), list):
        trainer["callbacks"] = [c for c in trainer["callbacks"] if not _is_cosmetic_callback(c)]
    shortened: dict[str, Any] = _shorten_class_paths(rest)
    return shortened


def seedless(resolved: Mapping[str, Any]) -> dict[str, str]:
    """Return the config's leaves as text by dotted key, sorted, without seeds and cosmetic keys."""
    leaves = spelled(essential(resolved))
    return {key: leaves[key] for key in sorted(leaves) if key.split(".")[-1] not in _SEEDS}


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config as dotted keys, in order; empty mappings stay values."""
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        leaves.update(flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value})
    return leaves


def _steps(study: Study, arm: Arm, resolve: Resolve, describe: Describe, folder: Path) -> int | None:
    """Return the optimiser steps of an arm's runs, or None where the clock ends them."""
    budget = study.budget
    if budget.minutes is not None:
        return None
    if budget.max_steps is not None:
        return budget.max_steps
    resolved = _planned(study, arm, study.comparison.seeds[0], 1, resolve, folder).resolved
    return _in_arm(study, arm, lambda: budget.steps(resolved, describe(resolved)))


def _of_arm(
    study: Study, arm: Arm, steps: int | None, resolve: Resolve, folder: Path, proven: set[frozenset[Key]]
) -> list[PlannedRun]:
    """Return an arm's runs, from one resolved config where that holds the seed at known keys.

    Keys are known once the configs of the smallest and the largest seed, resolved by themselves, came out the same.
    """
    runs = _of_marked(study, arm, steps, resolve, folder, proven) if len(study.comparison.seeds) > 1 else None
    return runs or [_planned(study, arm, seed, steps, resolve, folder) for seed in study.comparison.seeds]


def _of_marked(
    study: Study, arm: Arm, steps: int | None, resolve: Resolve, folder: Path, proven: set[frozenset[Key]]
) -> list[PlannedRun] | None:
    """Return an arm's runs from one config with a mark for the seed; None where each has to be resolved."""
    files = (find_file(file) for file in study.base)
    texts = [file.read_text(encoding="utf-8") for file in files if file is not None]
    if not follow_plainly([*texts, json.dumps([study.all_arms, arm.changes], default=str)]):
        return None
    seeds = study.comparison.seeds
    overrides = _with_places(_draft(study, arm, seeds[0], steps), folder)
    _set(overrides, "seed_everything", MARK)
    try:
        marked = resolve(list(study.base), overrides)
    except UserError:
        return None  # told with a seed of the study in the mark's place
    keys = marked_keys(marked)
    if keys is None:
        return None
    if steps is None:
        _refuse_endless_schedule(study, marked)
    runs = [_identified(_draft(study, arm, seed, steps), with_seed(marked, keys, seed), folder) for seed in seeds]
    if keys not in proven:
        for run in (min(runs, key=attrgetter("seed")), max(runs, key=attrgetter("seed"))):
            if _planned(study, arm, run.seed, steps, resolve, folder).digest != run.digest:
                return None
        proven.add(keys)
    return runs


def _planned(study: Study, arm: Arm, seed: int, steps: int | None, resolve: Resolve, folder: Path) -> PlannedRun:
    # Checked with everything that the child will get, although the digest that some keys name is not known yet.
    draft = _draft(study, arm, seed, steps)
    resolved = _in_arm(study, arm, lambda: resolve(list(study.base), _with_places(draft, folder)))
    if steps is None:
        _refuse_endless_schedule(study, resolved)
    return _identified(draft, resolved, folder)


def _draft(study: Study, arm: Arm, seed: int, steps: int | None) -> PlannedRun:
    overrides = overlaid(study.all_arms, arm.changes)
    _set(overrides, "seed_everything", seed)
    _set(overrides, "trainer.max_steps", -1 if steps is None else steps)
    _set(overrides, "trainer.max_epochs", -1)  # an epoch limit of the base must not cut the budget
    if steps is None:
        _set(overrides, "trainer.max_time", study.budget.max_time)
    return PlannedRun(study.comparison.name, arm.name, seed, overrides, {}, digest="0" * DIGITS, max_steps=steps)


def _identified(draft: PlannedRun, resolved: dict[str, Any], folder: Path) -> PlannedRun:
    run = dataclasses.replace(draft, resolved=resolved, digest=digest_of(resolved))
    return dataclasses.replace(run, overrides=_with_places(run, folder))


def _with_places(run: PlannedRun, folder: Path) -> dict[str, Any]:
    """Return the overrides with what is cosmetic: where the run is written and under which name."""
    overrides = copy.deepcopy(run.overrides)
    _set(overrides, "trainer.default_root_dir", str(folder / run.folder))
    _set(overrides, "trainer.logger.init_args.experiment_name", run.study)
    _set(overrides, "trainer.logger.init_args.run_name", run.name)
    _set(overrides, "trainer.logger.init_args.tags", tags_of(run))
    return overrides


def tags_of(run: PlannedRun) -> dict[str, str]:
    """Return the tags by which a run is found again in the tracker."""
    return {"sweep": run.study, "arm": run.arm, "seed": str(run.seed), "digest": run.digest}


def _in_arm(study: Study, arm: Arm, work: Callable[[], Result]) -> Result:
    try:
        return work()
    except UserError as error:
        raise UserError(f"{study.file}:{arm.line}: arm {arm.name!r}: {error}") from error


def _refuse_twins(study: Study, runs: tuple[PlannedRun, ...]) -> None:
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        twin = seen.setdefault(run.digest, run)
        if twin is not run and twin.arm != run.arm:
            raise UserError(
                f"{study.file}: arms {twin.arm!r} and {run.arm!r} are the same run (digest {run.digest}): "
                f"{run.arm!r} sets nothing that differs; change a value or remove the arm"
            )
        if twin is not run:
            raise UserError(
                f"{study.file}: seeds {twin.seed} and {run.seed} of arm {run.arm!r} resolve to one config: "
                "seed_everything has no effect on it; remove what fixes the seed in the base"
            )


def _refuse_idle_seeds(study: Study, runs: tuple[PlannedRun, ...]) -> None:
    """Refuse seeds that nothing follows: weights, masks and data order come from other keys than seed_everything."""
    seen: dict[tuple[str, str], PlannedRun] = {}
    for run in runs:
        rest = digest_of({key: value for key, value in run.resolved.items() if key != "seed_everything"})
        twin = seen.setdefault((run.arm, rest), run)
        if twin is not run:
            raise UserError(
                f"{study.file}: seeds {twin.seed} and {run.seed} of arm {run.arm!r} differ in seed_everything alone, "
                "which nothing follows, so both give the same run; set `data.seed: ${seed_everything}` and "
                "`model.seed: ${seed_everything}` in the base"
            )


def _refuse_unequal_flops(study: Study, cards: "Mapping[str, ModelCard]") -> None:
    """Refuse arms whose models compute more or less than the baseline's."""
    baseline = study.comparison.baseline
    wanted = cards[baseline].active_flops_per_sample
    for arm in study.comparison.arms:
        flops = cards[arm.name].active_flops_per_sample
        if abs(flops - wanted) > FLOPS_TOLERANCE * wanted:
            raise UserError(
                f"{study.file}:{arm.line}: arm {arm.name!r} has {flops:,} active FLOPs per sample, "
                f"{100 * (flops / wanted - 1):+.3g} % against the {wanted:,} of {baseline!r}, and `match: "
                "active_flops` allows 1 %; change hidden_dim, top_k or the number of blocks of one of them, or remove "
                "`match`"
            )


def _refuse_endless_schedule(study: Study, resolved: Mapping[str, Any]) -> None:
    """Refuse a learning-rate schedule whose length is the number of steps, which a budget of minutes leaves open."""
    model = resolved.get("model")
    schedule = model.get("schedule") if isinstance(model, dict) else None
    options = schedule.get("init_args") if isinstance(schedule, dict) else None
    if isinstance(options, dict) and options.get("total_steps") == -1:
        raise UserError(
            f"{study.file}: with a budget of minutes nobody knows the number of steps, and the schedule follows "
            "trainer.max_steps; set `model.schedule.init_args.total_steps` to a number in the base"
        )


def _set(config: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        config = config.setdefault(part, {})
    config[last] = value


def _remove(config: Any, path: list[str]) -> None:
    for part in path[:-1]:
        config = config.get(part) if isinstance(config, dict) else None
    if isinstance(config, dict):
        config.pop(path[-1], None)


def _shorten_class_paths(value: Any) -> Any:
    """Spell classes of this package by their short names: moving a file does not make another experiment."""
    if isinstance(value, dict):
        return {
            key: _short_name(item) if key == "class_path" else _shorten_class_paths(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_shorten_class_paths(item) for item in value]
    return value


def _short_name(class_path: Any) -> Any:
    is_ours = isinstance(class_path, str) and class_path.startswith(_OURS)
    return class_path.rpartition(".")[2] if is_ours else class_path


def _is_cosmetic_callback(callback: Any) -> bool:
    class_path = callback.get("class_path", "") if isinstance(callback, dict) else ""
    return any(str(class_path).endswith(cosmetic.name) for cosmetic in COSMETIC_CALLBACKS)


def _path_as_text(value: Any) -> str:
    assert isinstance(value, Path), f"a resolved config holds plain data, got {type(value).__name__}"
    return str(value)
