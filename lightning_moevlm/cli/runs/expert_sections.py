"""Makes the parts of an atlas that are asked for: what experts are needed for, their history, other runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number

if TYPE_CHECKING:
    from lightning_moevlm.atlas.causal.examine import To
    from lightning_moevlm.atlas.make_atlas import Atlas
    from lightning_moevlm.atlas.probe.probe_set import ProbeSet
    from lightning_moevlm.atlas.section import Section
    from lightning_moevlm.configuration.resolver import LoadedRun
    from lightning_moevlm.configuration.run_option import TrainedModel
    from lightning_moevlm.model.backbones import Backbone
    from lightning_moevlm.model.objectives import Objective
    from lightning_moevlm.training.checkpoints.find_checkpoint import FoundCheckpoint


class Asked(NamedTuple):
    """The parts that are asked for."""

    removed_to: "To | None"
    """Where the tokens of a removed expert go; None: no expert is removed."""
    checkpoints: Sequence["FoundCheckpoint"]
    """Those whose routing is followed."""
    others: Mapping[str, "TrainedModel"]
    """Runs whose experts are matched, by name."""


class Subject(NamedTuple):
    """A model and the samples that it is observed on."""

    found: "TrainedModel"
    loaded: "LoadedRun"
    probe: "ProbeSet"
    folder: Path
    """Of the trace of all tokens, and of temporary files."""
    batch_size: int

    @property
    def backbone(self) -> "Backbone":
        """The model."""
        return self.loaded.module.backbone

    @property
    def objective(self) -> "Objective":
        """That of its training."""
        return self.loaded.module.objective


def find_parts(
    found: "TrainedModel",
    removed_to: "To | None",
    history: bool,
    others: Sequence[str],
    tracking_uri: str | None,
) -> Asked:
    """Find what the parts are made of, before the atlas is made.

    Raises:
        UserError: a history of a checkpoint without a run or of fewer than two, or another run that is not there or is
            this one.
    """
    from lightning_moevlm.atlas.history.follow import refuse_short_course
    from lightning_moevlm.configuration.run_option import find_trained_model
    from lightning_moevlm.training.checkpoints.find_checkpoint import find_checkpoints

    checkpoints: list[FoundCheckpoint] = []
    if history:
        if found.folder is None:
            raise UserError("--history follows the checkpoints of a run, and this checkpoint is in the folder of none")
        checkpoints = find_checkpoints([found.folder / "checkpoints"])
        refuse_short_course([each.step for each in checkpoints])
    named = {}
    for name in others:
        store = None if Path(name).exists() else tracking_uri  # a folder needs no store, or has its own
        other = find_trained_model(name, "last", None, store)
        if other.checkpoint.resolve() == found.checkpoint.resolve():
            raise UserError(f"--others names {name}, which is this run itself: give runs of other seeds")
        named[name] = other
    return Asked(removed_to, checkpoints, named)


def check_parts(asked: Asked, subject: Subject) -> None:
    """Refuse parts that cannot be made of this model, before the minutes that the atlas takes.

    Raises:
        UserError: too few samples for a removal, an objective without losses of single samples, or another run whose
            model is of another family.
    """
    from lightning_moevlm.atlas.causal.effects import LEAST
    from lightning_moevlm.atlas.causal.scores import refuse_unscored
    from lightning_moevlm.atlas.history.follow import refuse_other_family
    from lightning_moevlm.configuration.resolver import load_run

    if asked.removed_to is not None:
        probe = subject.probe
        check_number("samples", probe.num_samples, least=LEAST, advice=" of the split to test a removal")
        batches = (each.batch for each in probe.batches(subject.batch_size))
        refuse_unscored(subject.objective, subject.backbone, batches, subject.loaded.module.draws("val"))
    for name, other in asked.others.items():
        with _naming(name):
            refuse_other_family(subject.backbone, load_run(other.checkpoint, other.config).module.backbone)


def make_sections(asked: Asked, subject: Subject, atlas: "Atlas") -> list["Section"]:
    """Return the sections, in their order.

    Raises:
        UserError: a part that cannot be made of these samples and models.
    """
    sections: list[Section] = []
    if asked.removed_to is not None:
        sections.append(_needs(asked.removed_to, subject, atlas))
    if asked.checkpoints:
        sections.append(_history(asked, subject, atlas))
    if asked.others:
        sections.append(_seeds(asked.others, subject))
    return sections


def _needs(to: "To", subject: Subject, atlas: "Atlas") -> "Section":
    from lightning_moevlm.atlas.causal.causal_section import causal_section
    from lightning_moevlm.atlas.causal.examine import examine
    from lightning_moevlm.atlas.causal.groups import group_samples
    from lightning_moevlm.atlas.causal.observed import observed_groups
    from lightning_moevlm.atlas.make_atlas import TRACE_FILE
    from lightning_moevlm.atlas.routing.trace import Trace

    observed = observed_groups(atlas)
    groups = group_samples(Trace(subject.folder / TRACE_FILE), atlas.names, {each.group for each in observed})
    examination = examine(
        subject.backbone, subject.objective, subject.loaded.module.draws("val"), subject.probe, atlas.layers, groups,
        observed, to, subject.batch_size,
    )  # fmt: skip
    return causal_section(examination)


def _history(asked: Asked, subject: Subject, atlas: "Atlas") -> "Section":
    from lightning_moevlm.atlas.history.follow import follow
    from lightning_moevlm.atlas.history.frozen import freeze_choices
    from lightning_moevlm.atlas.history.history_section import history_section
    from lightning_moevlm.configuration.resolver import load_run

    def load(file: Path) -> "Backbone":
        return load_run(file, subject.found.config).module.backbone

    course = [(each.step, each.path) for each in asked.checkpoints]
    history = follow(load, course, subject.objective, subject.probe, subject.folder, subject.batch_size)
    earlier = [(step, file) for step, file in course if step < int(subject.loaded.checkpoint["global_step"])]
    if asked.removed_to is None or not earlier:
        return history_section(history)
    frozen = freeze_choices(
        subject.backbone, subject.objective, subject.loaded.module.draws("val"), load, earlier, subject.probe,
        atlas.layers, subject.batch_size,
    )  # fmt: skip
    return history_section(history, frozen)


def _seeds(others: Mapping[str, "TrainedModel"], subject: Subject) -> "Section":
    from lightning_moevlm.atlas.history.follow import compare_runs
    from lightning_moevlm.atlas.history.history_section import seeds_section
    from lightning_moevlm.configuration.resolver import load_run

    runs = {}
    for name, other in others.items():
        module = load_run(other.checkpoint, other.config).module
        objectives = (subject.objective, module.objective)
        with _naming(name):
            runs[name] = compare_runs(
                subject.backbone, module.backbone, objectives, subject.probe, subject.folder, subject.batch_size
            )
    return seeds_section(runs)


@contextmanager
def _naming(other: str) -> Iterator[None]:
    """Let an error say which of --others it is of."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--others {other}: {error}") from error
