"""Checks that runs may be compared, and lists their differences.

Within a seed all arms must see the same data in the same order, in the same number of equal steps, at the same part of
their schedule, and be validated on the same samples. A difference in these biases the comparison and is refused.
Differences in code, kernels, dtypes and versions change results a little and speed a lot. They are a warning, since a
commit between two starts of a sweep is common. So are active FLOPs more than 1 % apart: an arm may gain by computing
more. A difference that the study file declares in an arm is listed and not refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.flat_config import flatten_values
from lightning_moevlm.study.declare.budget import samples_per_step
from lightning_moevlm.study.plan.run_identity import COSMETIC_KEYS
from lightning_moevlm.study.run.mlflow_runs import TAKEN_FROM
from lightning_moevlm.tracking.write.run_params import CHANGED_TAG

_LEARNT_FROM = ("model.", "data.", "trainer.max_steps", "trainer.accumulate_grad_batches", "trainer.precision")
_COSMETIC = frozenset(cosmetic.name for cosmetic in COSMETIC_KEYS)


class Weight(StrEnum):
    """The consequence of a difference."""

    BIASES = "biases"
    WARNS = "warns"
    DECLARED = "declared"


@dataclass(frozen=True)
class Subject:
    """One run with a result."""

    arm: str
    seed: int
    changes: Mapping[str, Any]
    """Declared by its arm, dotted."""
    resolved: Mapping[str, Any]
    """Whole config."""
    tags: Mapping[str, str]
    """Code, versions, data and kernels."""
    steps: int | None
    """Of the optimiser; None if the run diverged, which may end it early, or logged nothing."""
    budget_in_steps: bool = True
    """False if the study equalises something else, so that each arm has its own number of steps."""
    compute: str = ""
    """Active FLOPs of a sample in words, the same for equal ones; empty if unknown."""


class Aspect(NamedTuple):
    """One thing that must be the same."""

    name: str
    biases: bool
    keys: tuple[str, ...]
    """Config keys that decide it."""
    read: Callable[[Subject], Mapping[str, str]]
    """Returns value by name; unknown ones are absent."""


@dataclass(frozen=True)
class Difference:
    """One thing that was not the same."""

    name: str
    weight: Weight
    values: Mapping[str, tuple[str, ...]]
    """Runs, by arm and seed, of each value."""
    keys: tuple[str, ...] = ()
    """Config keys that decide it."""

    @property
    def text(self) -> str:
        """The values with the arms or runs that have them."""
        return "; ".join(f"{value} ({', '.join(runs)})" for value, runs in self.values.items())


def find_differences(subjects: Sequence[Subject]) -> tuple[Difference, ...]:
    """Return the differences between runs, those that bias first."""
    found = [one for aspect in ASPECTS for one in _compare_aspect(aspect, subjects)]
    order = list(Weight)
    return tuple(sorted(found, key=lambda one: order.index(one.weight)))


def refuse_biased(name: str, found: Sequence[Difference], remedy: str) -> None:
    """Refuse to compare runs with a difference that biases.

    Args:
        name: Of the comparison.
        found: From `find_differences`.
        remedy: Sentence that ends the message.

    Raises:
        UserError: Names the differences and the runs.
    """
    biased = [one for one in found if one.weight is Weight.BIASES]
    if biased:
        text = "; ".join(f"{one.name}: {one.text}" for one in biased)
        raise UserError(f"{name}: these runs cannot be compared, they differ in {text}. {remedy}")


def _compare_aspect(aspect: Aspect, subjects: Sequence[Subject]) -> list[Difference]:
    """Compare every part of an aspect among the runs in which it is known."""
    read = [(subject, aspect.read(subject)) for subject in subjects]
    parts = dict.fromkeys(part for _, values in read for part in values)
    return [one for part in parts if (one := _compare_part(aspect, part, [(s, v[part]) for s, v in read if part in v]))]


def _compare_part(aspect: Aspect, part: str, known: list[tuple[Subject, str]]) -> Difference | None:
    """Compare one part, first without the runs whose arm declares it."""
    weight = Weight.BIASES if aspect.biases else Weight.WARNS
    plain = [(subject, value) for subject, value in known if not _declares(subject, aspect)]
    if len({value for _, value in plain}) <= 1:
        plain, weight = known, Weight.DECLARED
    values: dict[str, list[Subject]] = {}
    for subject, value in plain:
        values.setdefault(value, []).append(subject)
    if len(values) <= 1:
        return None
    name = f"{aspect.name} {part}".strip()
    named = {value: _names(having, known) for value, having in values.items()}
    return Difference(name, weight, named, aspect.keys)


def _names(having: list[Subject], all_known: list[tuple[Subject, str]]) -> tuple[str, ...]:
    """Return the names of arms all of whose runs are given, else of runs."""
    names: list[str] = []
    for arm in dict.fromkeys(subject.arm for subject in having):
        mine = [subject for subject in having if subject.arm == arm]
        whole = sum(subject.arm == arm for subject, _ in all_known) == len(mine)
        names += [arm] if whole else [f"{arm}-seed{subject.seed}" for subject in mine]
    return tuple(names)


def _declares(subject: Subject, aspect: Aspect) -> bool:
    return any(key == mine or key.startswith(f"{mine}.") for key in subject.changes for mine in aspect.keys)


def _one(value: object) -> dict[str, str]:
    return {} if value is None else {"": str(value)}


def _steps(subject: Subject) -> dict[str, str]:
    if subject.budget_in_steps or subject.steps is None:
        return _one(subject.steps)
    planned = flatten_values(subject.resolved).get("trainer.max_steps")
    if not isinstance(planned, int) or planned <= 0:
        return {}  # a budget of time
    return _one(f"{subject.steps / planned:.4g} of those planned")


def _batch(subject: Subject) -> dict[str, str]:
    """Samples and batches of a step: each batch is of a stream of its own, so 4 of 8 differ from one of 32."""
    samples = samples_per_step(subject.resolved)
    batches = (subject.resolved.get("trainer") or {}).get("accumulate_grad_batches") or 1
    return _one(samples if samples is None or batches == 1 else f"{samples} in {batches} batches")


def _schedule(subject: Subject) -> dict[str, str]:
    """The share of the schedule's steps that the run makes."""
    leaves = flatten_values(subject.resolved)
    total, steps = leaves.get("model.schedule.init_args.total_steps"), leaves.get("trainer.max_steps")
    if not isinstance(total, int) or not isinstance(steps, int) or total <= 0:
        return {}
    return {"": f"{steps / total:.4g} of its steps"}


def _manifest(subject: Subject) -> dict[str, str]:
    return _one(subject.tags.get("manifest_digest", "")[:12] or None)


def _order(subject: Subject) -> dict[str, str]:
    """The data's config without batch size; its seed is compared within a seed."""
    data = subject.resolved.get("data")
    leaves = flatten_values(data) if isinstance(data, Mapping) else {}
    named = {name: str(value) for name, value in leaves.items() if name not in ("seed", "batch_size")}
    seed = leaves.get("seed")
    return named | ({f"seed of seed {subject.seed}": str(seed)} if seed is not None else {})


def _held_out(subject: Subject) -> dict[str, str]:
    """The part of the validation set that every validation reads.

    A limit is in batches, so it means other samples if batches have another size.
    """
    trainer, data = subject.resolved.get("trainer"), subject.resolved.get("data")
    if not isinstance(trainer, Mapping) or "limit_val_batches" not in trainer:
        return {}
    size = data.get("batch_size") if isinstance(data, Mapping) else None
    of = "" if size is None else f" of {size} samples"

    def describe(limit: object) -> str:
        if limit in (None, -1) or (isinstance(limit, float) and limit == 1.0):
            return "all"
        return f"{limit:g} of all batches{of}" if isinstance(limit, float) else f"{limit} batches{of}"

    at_start = trainer.get("num_sanity_val_steps", -1)
    return {"": describe(trainer["limit_val_batches"]), "of the untrained model": describe(at_start)}


def _resumed(subject: Subject) -> dict[str, str]:
    """Values that a resume changed: MLflow's params, and so the config, are those of the beginning."""
    changed = {tag.removeprefix(CHANGED_TAG): text for tag, text in subject.tags.items() if tag.startswith(CHANGED_TAG)}
    counted = (key for key in sorted(changed) if key.startswith(_LEARNT_FROM) and key not in _COSMETIC)
    return _one(", ".join(f"{key} to {changed[key]}" for key in counted) or "nothing")


def _compute(subject: Subject) -> dict[str, str]:
    return _one(subject.compute or None)


def _commit(subject: Subject) -> dict[str, str]:
    commit = subject.tags.get("commit")
    return _one(commit and commit[:12] + (" with edits" if subject.tags.get("commit_dirty") == "true" else ""))


def _trained_for(subject: Subject) -> dict[str, str]:
    """The study that a run was taken from, on whose machine its speed was measured."""
    origin = subject.tags.get(TAKEN_FROM, "").partition("/")[0]
    return _one(origin or "this one")


def _kernels(subject: Subject) -> dict[str, str]:
    """The dispatcher of each layer, without its reasons; a layer that another arm lacks is not compared."""
    prefix = "dispatch/"
    return {
        tag.removeprefix(prefix): text.split(" ")[0] for tag, text in subject.tags.items() if tag.startswith(prefix)
    }


def _dtypes(subject: Subject) -> dict[str, str]:
    leaves = flatten_values(subject.resolved)
    routers = {"of routers": tag} if (tag := subject.tags.get("router_dtype")) else {}
    return routers | {
        key: str(value) for key, value in leaves.items() if key.startswith(("trainer.precision", "model.precision"))
    }


def _devices(subject: Subject) -> dict[str, str]:
    trainer = subject.resolved.get("trainer")
    named = ("accelerator", "devices", "num_nodes", "strategy")
    return {name: str(trainer[name]) for name in named if name in trainer} if isinstance(trainer, Mapping) else {}


def _versions(subject: Subject) -> dict[str, str]:
    prefix = "version/"
    return {tag.removeprefix(prefix): text for tag, text in subject.tags.items() if tag.startswith(prefix)}


ASPECTS: tuple[Aspect, ...] = (
    Aspect("steps made", True, ("trainer.max_steps",), _steps),
    Aspect("schedule", True, ("model.schedule", "trainer.max_steps"), _schedule),
    Aspect(
        "samples per step",
        True,
        ("data.batch_size", "trainer.accumulate_grad_batches", "trainer.devices", "trainer.num_nodes"),
        _batch,
    ),
    Aspect("data manifest", True, ("data",), _manifest),
    Aspect("data order", True, ("data",), _order),
    Aspect("validation samples", True, ("trainer.limit_val_batches", "trainer.num_sanity_val_steps"), _held_out),
    Aspect("changed by a resume", True, (), _resumed),
    Aspect("active FLOPs of a sample", False, ("model", "data"), _compute),
    Aspect("code commit", False, (), _commit),
    Aspect("trained for study", False, (), _trained_for),
    Aspect("kernel path", False, ("model.backbone", "model.precision", "trainer.precision"), _kernels),
    Aspect("dtype", False, ("model.precision", "trainer.precision"), _dtypes),
    Aspect("device", False, ("trainer",), _devices),
    Aspect("version of", False, (), _versions),
)
