"""Explains the events of a recording."""

from collections.abc import Mapping
from typing import NamedTuple

from lightning_moevlm.study.forensics.first_moved import Moved, find_moved
from lightning_moevlm.study.forensics.illnesses import Diagnosis, Evidence, diagnose
from lightning_moevlm.tracking.recordings.recording import Event, Recording


class Explanation(NamedTuple):
    """A step in which something went wrong."""

    step: int
    events: tuple[Event, ...]
    """Those of the step."""
    moved: tuple[Moved, ...]
    """The first one first."""
    before: tuple[Event, ...]
    """Events of earlier steps in the recording."""
    keys: Mapping[str, tuple[str, ...]]
    """Samples of the step, by source."""
    diagnoses: tuple[Diagnosis, ...]
    """Most likely first."""

    @property
    def first(self) -> Moved | None:
        """The quantity that moved first."""
        return next(iter(self.moved), None)

    @property
    def first_term(self) -> str | None:
        """The loss term that moved first."""
        return next((one.quantity.partition("/")[2] for one in self.moved if one.kind == "loss"), None)

    @property
    def first_layer(self) -> str | None:
        """The layer in which something moved first."""
        return next((one.layer for one in self.moved if one.layer), None)


def explain(recording: Recording) -> list[Explanation]:
    """Return an explanation for each step with an event, by step."""
    explained = []
    for step in sorted({event.step for event in recording.events}):
        moved = find_moved(recording.steps, step)
        keys = next((one.keys for one in recording.steps if one.step == step), {})
        explained.append(
            Explanation(
                step,
                tuple(event for event in recording.events if event.step == step),
                tuple(moved),
                tuple(event for event in recording.events if event.step < step),
                keys,
                tuple(diagnose(Evidence(step, moved, recording.steps))),
            )
        )
    return explained
