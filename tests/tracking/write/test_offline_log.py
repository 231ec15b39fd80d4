"""The offline log alone, with a writer that remembers: what is kept, how it leaves, what a kill leaves behind."""

import json
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.write import offline_log
from lightning_moevlm.tracking.write.offline_log import (
    JOURNAL,
    Address,
    OfflineLog,
    PendingCount,
    find_offline_logs,
)

ADDRESS = Address("http://***@host", "run")


class Remembering:
    """Stands for a RunWriter. fail_at: number of the write that fails, from 0."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.written: list[Any] = []
        self._fail_at = fail_at

    def _take(self, what: object) -> None:
        if not what:
            return
        if len(self.written) == self._fail_at:
            raise OSError("gone")
        self.written.append(what)

    def write_points(self, points: list[Point]) -> None:
        self._take([(point.key, point.step, point.value) for point in points])

    def write_tags(self, tags: dict[str, str]) -> None:
        self._take(dict(tags))

    def write_params(self, params: dict[str, str]) -> None:
        self._take(dict(params))

    def write_file(self, path: Path, name: str) -> None:
        self._take((name, path.read_text()))

    def rewind(self, step: int) -> None:
        self._take(f"rewind {step}")

    def end(self, status: str, end_ms: int) -> None:
        self._take((status, end_ms))


def log_point(log: OfflineLog, step: int, value: float = 0.5) -> OSError | None:
    return log.append(metrics={"a": value}, step=step, time_ms=1)


def filled(folder: Path) -> OfflineLog:
    log = OfflineLog.begin(folder, ADDRESS)
    log.append(params={"dim": "8"})
    log_point(log, 0)
    log_point(log, 1)
    log.append(tags={"t": "1"})
    log.append(rewind=0)
    log_point(log, 1, 0.7)
    with log.add_files() as files:
        (files / "notes").mkdir()
        (files / "notes" / "late.txt").write_text("late")
    log.append(status="FINISHED", end_ms=7)
    return log


EVERYTHING = [
    {"dim": "8"},
    {"t": "1"},
    [("a", 0, 0.5), ("a", 1, 0.5)],
    "rewind 0",
    [("a", 1, 0.7)],
    ("notes/late.txt", "late"),
    ("FINISHED", 7),
]
FILE = EVERYTHING[5]


def test_everything_leaves_in_its_order_and_nothing_stays(tmp_path: Path) -> None:
    log = filled(tmp_path)
    assert log.count() == PendingCount(points=3, files=1)
    assert not log.is_empty
    writer = Remembering()
    log.upload(writer, has_ended=True)
    assert writer.written == EVERYTHING
    assert log.is_empty and log.count() == PendingCount(0, 0)
    log.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fail_at", range(7))
def test_another_process_begins_again_after_a_failure_anywhere(tmp_path: Path, fail_at: int) -> None:
    log = filled(tmp_path)
    first = Remembering(fail_at)
    with pytest.raises(OSError, match="gone"):
        log.upload(first, has_ended=True)
    log.release()
    second = Remembering()
    [later] = find_offline_logs(tmp_path)
    assert later.address == ADDRESS
    assert later.hold()
    later.upload(second, has_ended=True)
    # Files go once they are taken, everything else comes again from the start.
    assert second.written == [one for one in EVERYTHING if fail_at < 6 or one != FILE]


def test_the_same_process_continues_where_it_failed(tmp_path: Path) -> None:
    log = filled(tmp_path)
    with pytest.raises(OSError, match="gone"):
        log.upload(Remembering(fail_at=4), has_ended=True)
    log_point(log, 3)
    second = Remembering()
    log.upload(second, has_ended=True)
    assert second.written == [[("a", 1, 0.7), ("a", 3, 0.5)], FILE, ("FINISHED", 7)]


def test_a_run_that_continues_has_no_ending(tmp_path: Path) -> None:
    writer = Remembering()
    filled(tmp_path).upload(writer, has_ended=False)
    assert writer.written == EVERYTHING[:-1]


def test_writes_are_of_a_thousand_points(tmp_path: Path) -> None:
    log = OfflineLog.begin(tmp_path, ADDRESS)
    for step in range(2345):
        log_point(log, step)
    writer = Remembering()
    log.upload(writer, has_ended=True)
    assert [len(part) for part in writer.written] == [1000, 1000, 345]


def test_the_journal_is_json_and_loses_no_number(tmp_path: Path) -> None:
    log, values = OfflineLog.begin(tmp_path, ADDRESS), [0.1, math.nan, math.inf, -math.inf]
    for step, value in enumerate(values):
        log_point(log, step, value)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in log.journal.read_text().splitlines()]
    assert lines[0] == {"store": "http://***@host", "run_id": "run"}
    assert lines[1] == {"metrics": {"a": 0.1}, "step": 0, "time_ms": 1}
    writer = Remembering()
    log.upload(writer, has_ended=True)
    assert str([value for _, _, value in writer.written[0]]) == str(values)


def test_uploaded_lines_leave_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where more was logged during the upload, so that a long run's journal stays short."""
    log = OfflineLog.begin(tmp_path, ADDRESS)
    header = log.journal.read_bytes()
    log_point(log, 0)
    log.upload(Remembering(), has_ended=False)
    assert log.journal.read_bytes() == header
    monkeypatch.setattr(offline_log, "_COMPACT_BYTES", 100)

    class Meanwhile(Remembering):
        def write_points(self, points: list[Point]) -> None:
            log_point(log, 100)

    for step in range(10):
        log_point(log, step)
    log.upload(Meanwhile(), has_ended=False)
    assert len(log.journal.read_bytes()) < len(header) + 60
    log_point(log, 101)
    writer = Remembering()
    log.upload(writer, has_ended=False)
    assert writer.written == [[("a", 100, 0.5), ("a", 101, 0.5)]]
    assert log.journal.read_bytes() == header


def test_a_line_that_a_kill_cut_short_does_not_count(tmp_path: Path) -> None:
    log = OfflineLog.begin(tmp_path, ADDRESS)
    log_point(log, 0)
    log_point(log, 1)
    log.release()
    log.journal.write_bytes(log.journal.read_bytes()[:-5])
    unfinished = log.folder / "000000"
    unfinished.mkdir()
    (unfinished / "half").write_text("ha")
    [later] = find_offline_logs(tmp_path)
    assert later.hold()
    assert later.count() == PendingCount(1, 0)
    writer = Remembering()
    later.upload(writer, has_ended=True)
    assert writer.written == [[("a", 0, 0.5)]]
    later.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_lines_in_memory_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = OfflineLog.begin(tmp_path, ADDRESS)
    log_point(log, 0)
    whole = log.journal.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(log, "_stream", Full(log._stream))
        error = log_point(log, 1)
        assert error is not None and error.strerror == "No space left on device"
        log_point(log, 2)
        assert log.sync() is not None
        assert log.journal.read_bytes() == whole
        assert (log.count(), log.num_in_memory) == (PendingCount(1, 0), 2)
        writer = Remembering()
        log.upload(writer, has_ended=False)  # a store on another disk takes them
        assert writer.written == [[("a", 0, 0.5), ("a", 1, 0.5), ("a", 2, 0.5)]]
        assert log.is_empty
        log_point(log, 3)
    assert log.sync() is None  # there is room again
    assert log.count() == PendingCount(1, 0)
    assert b'"step": 3' in log.journal.read_bytes()


class Full:
    """A file whose disk takes ten more bytes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, data: bytes) -> int:
        return int(self._stream.write(data[:10]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def test_files_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    log = OfflineLog.begin(tmp_path, ADDRESS)
    told = r"No space.*free disk space or grant write permission, then resume"
    with pytest.raises(UserError, match=told), log.add_files() as files:
        (files / "half").write_text("ha")
        raise OSError(28, "No space left on device")
    assert log.count() == PendingCount(0, 0)
    assert sorted(path.name for path in log.folder.iterdir()) == ["files", JOURNAL, "lock"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file could not be written \(Not a directory\); free disk space or grant"):
        OfflineLog.begin(tmp_path / "file", ADDRESS)


def _hold_elsewhere(folder: Path, answer: Any) -> None:
    answer.send(OfflineLog(folder).hold())


def _child_lives_on(folder: Path, answer: Any) -> None:
    """Begin a log, leave a child behind that has inherited every open file, and die."""
    log = filled(folder)
    child = os.fork()
    if child == 0:
        import time

        time.sleep(30)
        os._exit(0)
    answer.send((log.folder, child))
    os.kill(os.getpid(), 9)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    log = filled(tmp_path)
    assert not OfflineLog(log.folder).hold()  # nor twice in one process
    here, there = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    for expected in (False, True):
        other = spawn.Process(target=_hold_elsewhere, args=(log.folder, there))
        other.start()
        other.join()
        assert here.recv() is expected
        log.release()


def test_a_killed_process_holds_nothing_although_its_children_live(tmp_path: Path) -> None:
    """As the workers of a DataLoader do for seconds."""
    here, there = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=_child_lives_on, args=(tmp_path, there))
    other.start()
    folder, child = here.recv()
    other.join()
    try:
        assert OfflineLog(folder).hold()
    finally:
        os.kill(child, 9)


@pytest.mark.parametrize("text", ["", "[]\n", '{"key": "a"}\n', "no json\n"])
def test_a_journal_without_its_first_line_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / JOURNAL).write_text(text)
    with pytest.raises(UserError, match="does not name a store and a run"):
        _ = OfflineLog(tmp_path).address
