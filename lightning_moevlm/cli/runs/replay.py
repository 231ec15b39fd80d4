"""`moevlm replay`: the steps around an event once more, each time with one change: would it have prevented it?"""

import json as json_format
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightning_moevlm.cli.output import console, json_number, show
from lightning_moevlm.common.atomic_files import explain_write_errors
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.run.engines import Engine, LocalEngine

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_moevlm.configuration.run_option import RecordedRun
    from lightning_moevlm.study.forensics.replay.answer import Answer
    from lightning_moevlm.study.forensics.replay.arms import Arm
    from lightning_moevlm.study.forensics.replay.course import Course
    from lightning_moevlm.study.forensics.replay.proof import Proof
    from lightning_moevlm.study.forensics.replay.run_arms import ArmRun, Setting
    from lightning_moevlm.tracking.recordings.recording import RecordedStep, Recording
    from lightning_moevlm.training.checkpoints.find_checkpoint import FoundCheckpoint

_CALLBACKS = "lightning_moevlm.training.callbacks.recording"
_LATER = 10  # steps after the event in the table


def replay(
    run: str,
    step: int | None = None,
    changes: list[str] | None = None,
    steps: int = 16,
    frozen_routing: bool = True,
    frozen_at: int | None = None,
    from_start: bool = False,
    json: str | None = None,
    out: str | None = None,
    tracking_uri: str | None = None,
) -> int:
    """Train the steps around an event of a run again, each time with one change, and say what would have prevented it.

    Every replay starts from the last checkpoint before the event, with the same samples, masks and noise. The first one
    changes nothing and must equal the run bit for bit; otherwise the exit code is 1. Finished replays are not repeated.

    Args:
        run: Folder, name or id of a run.
        step: Optimiser step of the event; by default that of the run's first recorded one.
        changes: Change to try, KEY=VALUE, or a FILE for one change of several options; may be repeated.
        steps: Optimiser steps to train after the event. The schedule stays that of the whole run.
        frozen_routing: Also replay with experts chosen by earlier weights, which shows the part of routing.
        frozen_at: Step whose weights then choose, from the next step on; by default the step before the event.
        from_start: Start from the untrained model if no checkpoint is early enough.
        json: Write one record per arm to this file as JSON instead of the table; - is standard output.
        out: Folder for the picture; by default the run's folder, in recordings/.
        tracking_uri: MLflow store of the run; by default MLFLOW_TRACKING_URI, else runs/mlflow.db.
    """
    from lightning_moevlm.cli.training import rehearse
    from lightning_moevlm.configuration.run_option import find_recorded_run
    from lightning_moevlm.study.forensics.replay.arms import make_arms
    from lightning_moevlm.study.forensics.replay.run_arms import find_arm, run_arms

    if steps < 0:
        raise UserError(f"--steps is {steps}: give the optimiser steps after the event, 0 or more")
    recorded, store = find_recorded_run(run, tracking_uri)
    recordings = _recordings(recorded.folder)
    step = _choose_step(step, run, recordings)
    start = None if from_start else _checkpoint_before(step, recorded, run)
    first = 1 if start is None else start.step + 1
    at = max(step - 1, 1) if frozen_at is None else frozen_at
    if not first <= at <= step:
        at = first if frozen_at is None else _refuse_frozen_at(at, first, step)
    arms = make_arms(changes or (), _frozen_arm(at) if frozen_routing else None)
    setting = _setting(recorded, store, step, step + steps, start, recordings)
    for arm in arms:
        if find_arm(arm, setting) is None:
            rehearse(setting.words(arm, {}))
    terminal = console(to_stderr=True)
    done = run_arms(arms, setting, _engine(), lambda line: terminal.print(line, highlight=False, markup=False))
    found = _judge(done, setting, recordings, first - 1)
    folder = recorded.folder / "recordings" if out is None else Path(out)
    picture = _draw(found, setting, folder)
    if json is not None:
        show("", _records(found, setting, picture), json)
    else:
        _print(found, setting, picture)
    return 0 if found.proof.holds and not found.refused else 1


class _Found(NamedTuple):
    """The result of a replay."""

    runs: tuple["ArmRun", ...]
    courses: Mapping[str, "Course"]
    answers: Mapping[str, "Answer"]
    """By arm, without the unchanged one."""
    proof: "Proof"
    reasons: tuple[str, ...]
    """Known differences between the run and its replay that may break the proof."""
    past: tuple[tuple[int, float], ...]
    refused: bool
    """Whether a change of the user could not be replayed."""


def _engine() -> Engine:
    from torch import cuda

    return LocalEngine(num_gpus=0, fork=not cuda.is_available())


def _recordings(folder: Path) -> list["Recording"]:
    from lightning_moevlm.tracking.recordings.recording import FOLDER, read_recording

    return [read_recording(file) for file in sorted((folder / FOLDER).glob("*.safetensors"))]


def _choose_step(step: int | None, run: str, recordings: Sequence["Recording"]) -> int:
    events = sorted(event.step for recording in recordings for event in recording.events)
    if step is None:
        if not events:
            raise UserError(f"run {run} has no recorded event: give --step N, the optimiser step to replay")
        return events[0]
    if step < 1:
        raise UserError(f"--step is {step}: give an optimiser step from 1 on")
    return step


def _checkpoint_before(step: int, run: "RecordedRun", name: str) -> "FoundCheckpoint":
    from lightning_moevlm.training.checkpoints.find_checkpoint import find_checkpoint_before, find_checkpoints

    places = [run.folder / "recordings", *run.checkpoint_folders]
    found = find_checkpoint_before(step, places)
    if found is None:
        steps = sorted(each.step for each in find_checkpoints(places))
        there = f"its first is of step {steps[0]}" if steps else "it has none"
        raise UserError(
            f"run {name} has no checkpoint from before step {step} ({there}): give a later --step, or --from_start "
            f"true to train all {step} steps; runs save more often with a smaller trainer.val_check_interval"
        )
    return found


def _refuse_frozen_at(at: int, first: int, step: int) -> int:
    raise UserError(f"--frozen_at is {at}: give a step that is replayed up to the event, {first} to {step}")


def _frozen_arm(at: int) -> "Arm":
    from lightning_moevlm.study.forensics.replay.arms import FROZEN, Arm

    return Arm(FROZEN, (_callback("frozen_routing.FrozenRouting", step=at),))


def _callback(name: str, **arguments: int) -> str:
    part = {"class_path": f"{_CALLBACKS}.{name}", "init_args": arguments}
    return f"--trainer.callbacks+={json_format.dumps(part)}"


def _setting(
    run: "RecordedRun",
    store: str,
    step: int,
    last_step: int,
    start: "FoundCheckpoint | None",
    recordings: Sequence["Recording"],
) -> "Setting":
    from lightning_moevlm.common.process_tuning import THREADS
    from lightning_moevlm.configuration.run_option import replay_words
    from lightning_moevlm.study.forensics.replay.run_arms import Setting
    from lightning_moevlm.tracking.read.runs import read_run

    row = read_run(store, run.folder.name)
    checkpoint = None if start is None else start.path.absolute()
    seed = str(run.resolved.get("seed_everything"))
    recorder = _callback("replay_recorder.ReplayRecorder", last_step=last_step)

    def words(arm: "Arm", tags: Mapping[str, str]) -> list[str]:
        shown = re.sub(r"[:#] | #", " ", arm.name)  # YAML would read more than a text
        name = f"replay of {row.name} at step {step}, {shown}"
        return replay_words(run, store, checkpoint, name, {**tags, "seed": seed}, [*arm.words, recorder])

    threads = next((one.about["threads"] for one in recordings if "threads" in one.about), None)
    environment = {} if threads is None else {THREADS: threads}
    return Setting(store, row, step, last_step, checkpoint, words, environment, run.folder / "replay")


def _judge(done: Sequence["ArmRun"], setting: "Setting", recordings: Sequence["Recording"], after: int) -> _Found:
    from lightning_moevlm.study.forensics.replay.answer import Answer, Verdict, answer
    from lightning_moevlm.study.forensics.replay.arms import FROZEN, UNCHANGED
    from lightning_moevlm.study.forensics.replay.course import judge_replay
    from lightning_moevlm.study.forensics.replay.proof import compare_points, compare_recordings, equal_steps
    from lightning_moevlm.tracking.read.runs import metric_histories
    from lightning_moevlm.tracking.recordings.recording import read_recording

    unchanged, *_ = done
    if unchanged.recording is None or unchanged.run_id is None:
        raise UserError(f"the unchanged replay failed: {unchanged.refusal}")
    known: dict[int, RecordedStep] = {one.step: one for recording in recordings for one in recording.steps}
    past = [known[step] for step in sorted(known) if step <= after and known[step].values]
    threshold = _threshold(recordings)
    replayed = {one.arm.name: read_recording(one.recording) for one in done if one.recording is not None}
    reference = replayed[UNCHANGED].steps
    courses = {
        name: judge_replay(past, each.steps, each.events, reference, threshold) for name, each in replayed.items()
    }
    answers: dict[str, Answer] = {}
    for one in done[1:]:
        name = one.arm.name
        if one.recording is None:
            answers[name] = Answer(Verdict.REFUSED, f"{name} {Verdict.REFUSED}: {one.refusal}")
            continue
        is_equal = equal_steps(reference, replayed[name].steps, after)
        answers[name] = answer(name, setting.step, courses[name], courses[UNCHANGED], is_equal)
    proof = compare_recordings(known, reference, after)
    if not proof.num_steps:
        points = metric_histories(setting.store, [setting.run.run_id, unchanged.run_id])
        proof = compare_points(points[setting.run.run_id], points[unchanged.run_id], after)
    losses = tuple((one.step, one.values["total_loss"]) for one in past)
    refused = any(each.verdict is Verdict.REFUSED for name, each in answers.items() if name != FROZEN)
    return _Found(tuple(done), courses, answers, proof, _reasons(setting, unchanged.run_id), losses, refused)


def _threshold(recordings: Sequence["Recording"]) -> float | None:
    """Return the threshold of the run's recorder."""
    texts = [one.about["threshold"] for one in recordings if "threshold" in one.about]
    return 6.0 if not texts else None if texts[0] == "None" else float(texts[0])


def _reasons(setting: "Setting", run_id: str) -> tuple[str, ...]:
    from lightning_moevlm.tracking.read.runs import read_run

    then, now = setting.run.tags, read_run(setting.store, run_id).tags
    keys = [key for key in then if key == "code_digest" or key.startswith("version/")]
    return tuple(f"{key} was {then[key]} and is {now.get(key)}" for key in keys if then[key] != now.get(key))


def _draw(found: _Found, setting: "Setting", folder: Path) -> Path:
    from lightning_moevlm.study.forensics.replay.picture import draw_replay
    from lightning_moevlm.study.forensics.replay.run_arms import keep_picture

    file = folder / f"replay_step{setting.step:08d}.png"
    with explain_write_errors(file):
        title = f"{setting.run.name}: step {setting.step} with one change each"
        draw_replay(found.courses, found.past, setting.step, title, file)
    unchanged = found.runs[0].run_id
    assert unchanged is not None
    keep_picture(setting.store, unchanged, file)
    return file


def _proof_line(found: _Found) -> str:
    proof = found.proof
    if proof.holds:
        return (
            f"The unchanged replay is the run, bit for bit: {proof.num_values} values of {proof.num_steps} steps "
            f"({proof.source})."
        )
    if proof.first is None:
        return "The unchanged replay cannot be compared with the run: it has logged nothing of these steps."
    first = proof.first
    why = f" {'; '.join(found.reasons)}." if found.reasons else ""
    return (
        f"The unchanged replay is not the run: first {first.quantity} at step {first.step} differs, {first.run} in the "
        f"run and {first.replay} here.{why} Answers compare with the unchanged replay."
    )


def _print(found: _Found, setting: "Setting", picture: Path) -> None:
    terminal = console()
    terminal.print(_table(found, setting))
    for line in (_proof_line(found), *(each.sentence for each in found.answers.values()), f"Picture: {picture}"):
        terminal.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(found: _Found, setting: "Setting") -> "Table":
    from rich.table import Table

    shown = [setting.step - 1, setting.step, setting.step + 1, min(setting.step + _LATER, setting.last_step)]
    table = Table(title=f"Step {setting.step} of {setting.run.name}")
    for column in (
        "arm",
        *(f"loss at {step}" for step in dict.fromkeys(shown)),
        "deviations",
        "spoilt steps",
        "answer",
    ):
        table.add_column(column, overflow="fold")
    for one in found.runs:
        name = one.arm.name
        course = found.courses.get(name)
        answer = found.answers[name].verdict if name in found.answers else "the run itself" if found.proof.holds else ""
        if course is None:
            table.add_row(name, *([""] * (len(table.columns) - 2)), answer)
            continue
        losses = [_number(at.loss) if (at := course.at(step)) else "" for step in dict.fromkeys(shown)]
        at = course.at(setting.step)
        score = "" if at is None else f"{at.score:+.1f}"
        table.add_row(name, *losses, score, str(_spoilt(course, setting.step)), answer)
    return table


def _records(found: _Found, setting: "Setting", picture: Path) -> list[dict[str, object]]:
    import msgspec

    records: list[dict[str, object]] = []
    for one in found.runs:
        course, answer = found.courses.get(one.arm.name), found.answers.get(one.arm.name)
        records.append(
            {
                "arm": one.arm.name,
                "step": setting.step,
                "run_id": one.run_id,
                "replays": setting.run.run_id,
                "verdict": None if answer is None else str(answer.verdict),
                "sentence": _proof_line(found) if answer is None else answer.sentence,
                "is_proved": found.proof.holds if answer is None else None,
                "events": [] if course is None else msgspec.to_builtins(course.events),
                "losses": {} if course is None else {str(at.step): json_number(at.loss) for at in course.steps},
                "scores": {} if course is None else {str(at.step): json_number(at.score) for at in course.steps},
                "spoilt_steps": None if course is None else _spoilt(course, setting.step),
                "picture": str(picture),
            }
        )
    return records


def _spoilt(course: "Course", step: int) -> int:
    from lightning_moevlm.study.forensics.replay.answer import count_spoilt

    return count_spoilt(course, step)


def _number(value: float) -> str:
    return f"{value:.4g}"
