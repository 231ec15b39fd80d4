"""Makes the parts of an atlas that are asked for: what experts are needed for, their history, other runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightning_moevlm.common.errors import UserError

if TYPE_CHECKING:
    from lightning_moevlm.atlas.causal.examine import To
    from lightning_moevlm.atlas.make_atlas import Atlas
    from lightning_moevlm.atlas.probe.probe_set import ProbeSet
    from lightning_moevlm.atlas.section import Section
    from lightning_moevlm.configuration.resolver import LoadedRun
    from lightning_moevlm.configuration.run_option import TrainedModel
    from lightning_moevlm.model.backbones import Backbone
    from lightning_moevlm.training.checkpoints.find_checkpoint import FoundCheckpoint


class Asked(NamedTuple):
    """The parts that are asked for."""

    removed_to: "To | None"
    """Where the tokens of a removed expert go; None: no expert is removed."""
    checkpoints: Sequence["FoundCheckpoint"]
    """Those whose routing is followed."""
    others: Mapping[str, "TrainedModel"]
    """Runs whose experts are matched, by name."""


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
    named = {name: find_trained_model(name, "last", None, tracking_uri) for name in others}
    for name, other in named.items():
        if other.checkpoint.resolve() == found.checkpoint.resolve():
            raise UserError(f"--others names {name}, which is this run itself: give runs of other seeds")
    return Asked(removed_to, checkpoints, named)


def make_sections(
    asked: Asked,
    atlas: "Atlas",
    found: "TrainedModel",
    loaded: "LoadedRun",
    probe: "ProbeSet",
    folder: Path,
    batch_size: int,
) -> list["Section"]:
    """Return the sections, in their order.

    Raises:
        UserError: a part that cannot be made of these samples and models.
    """
    sections: list[Section] = []
    if asked.removed_to is not None:
        sections.append(_needs(asked.removed_to, atlas, loaded, probe, folder, batch_size))
    if asked.checkpoints:
        sections.append(_history(asked, atlas, found, loaded, probe, folder, batch_size))
    if asked.others:
        sections.append(_seeds(asked.others, loaded, probe, folder, batch_size))
    return sections


def _needs(
    to: "To", atlas: "Atlas", loaded: "LoadedRun", probe: "ProbeSet", folder: Path, batch_size: int
) -> "Section":
    from lightning_moevlm.atlas.causal.causal_section import causal_section
    from lightning_moevlm.atlas.causal.examine import examine
    from lightning_moevlm.atlas.causal.groups import group_samples
    from lightning_moevlm.atlas.causal.observed import observed_groups
    from lightning_moevlm.atlas.make_atlas import TRACE_FILE
    from lightning_moevlm.atlas.routing.trace import Trace

    observed = observed_groups(atlas)
    groups = group_samples(Trace(folder / TRACE_FILE), atlas.names, {each.group for each in observed})
    module, layers = loaded.module, atlas.layers
    examination = examine(
        module.backbone, module.objective, module.draws("val"), probe, layers, groups, observed, to, batch_size
    )
    return causal_section(examination)


def _history(
    asked: Asked,
    atlas: "Atlas",
    found: "TrainedModel",
    loaded: "LoadedRun",
    probe: "ProbeSet",
    folder: Path,
    batch_size: int,
) -> "Section":
    from lightning_moevlm.atlas.history.follow import follow
    from lightning_moevlm.atlas.history.frozen import freeze_choices
    from lightning_moevlm.atlas.history.history_section import history_section
    from lightning_moevlm.configuration.resolver import load_run

    def load(file: Path) -> "Backbone":
        return load_run(file, found.config).module.backbone

    module, course = loaded.module, [(each.step, each.path) for each in asked.checkpoints]
    history = follow(load, course, module.objective, probe, folder, batch_size)
    earlier = [(step, file) for step, file in course if step < int(loaded.checkpoint["global_step"])]
    if asked.removed_to is None or not earlier:
        return history_section(history)
    frozen = freeze_choices(
        module.backbone, module.objective, module.draws("val"), load, earlier, probe, atlas.layers, batch_size
    )
    return history_section(history, frozen)


def _seeds(
    others: Mapping[str, "TrainedModel"], loaded: "LoadedRun", probe: "ProbeSet", folder: Path, batch_size: int
) -> "Section":
    from lightning_moevlm.atlas.history.follow import compare_runs
    from lightning_moevlm.atlas.history.history_section import seeds_section
    from lightning_moevlm.configuration.resolver import load_run

    mine, runs = loaded.module, {}
    for name, other in others.items():
        module = load_run(other.checkpoint, other.config).module
        objectives = (mine.objective, module.objective)
        try:
            runs[name] = compare_runs(mine.backbone, module.backbone, objectives, probe, folder, batch_size)
        except UserError as error:
            raise UserError(f"--others {name}: {error}") from error
    return seeds_section(runs)
