"""The journal alone, with a writer that remembers: what is kept, how it leaves, what a kill leaves behind."""

import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.write.offline_log import FILES, JOURNAL, Address, OfflineLog, PendingCount

ADDRESS = Address("http://***@host", "run")


class Remembering:
    """Stands for a RunWriter. fail_at: number of the write that fails, from 0."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.written: list[Any] = []
        self._fail_at = fail_at

    def _take(self, what: object) -> None:
        if len(self.written) == self._fail_at:
            raise OSError("gone")
        self.written.append(what)

    def points(self, points: list[Point]) -> None:
        self._take([(point.key, point.step, point.value) for point in points])

    def tags(self, tags: dict[str, str]) -> None:
        self._take(dict(tags))

    def params(self, params: dict[str, str]) -> None:
        self._take(dict(params))

    def file(self, path: Path, name: str) -> None:
        self._take((name, path.read_text()))

    def ending(self, status: str, end_ms: int) -> None:
        self._take((status, end_ms))


def point(step: int, value: float = 0.5) -> Point:
    return Point("a", step, value, 1)


def filled(folder: Path) -> OfflineLog:
    log = OfflineLog(folder, ADDRESS)
    log.keep_params({"dim": "8"})
    log.keep_points([point(0), point(1)])
    log.keep_tags({"t": "1"})
    log.keep_points([point(2)])
    text = folder / "text"
    text.write_text("late")
    log.keep_file(text, "notes/late.txt")
    log.keep_ending("FINISHED", 7)
    return log


EVERYTHING = [
    {"dim": "8"},
    [("a", 0, 0.5), ("a", 1, 0.5)],
    {"t": "1"},
    [("a", 2, 0.5)],
    ("notes/late.txt", "late"),
    ("FINISHED", 7),
]


def test_everything_leaves_in_its_order_and_nothing_stays(tmp_path: Path) -> None:
    log = filled(tmp_path)
    assert log.count() == PendingCount(points=3, files=1)
    writer = Remembering()
    log.deliver(writer, has_ended=True)
    assert writer.written == EVERYTHING
    assert log.is_empty
    assert {path.name for path in tmp_path.iterdir()} == {"text", ".undelivered.lock"}
    log.deliver(writer, has_ended=True)
    assert len(writer.written) == 6


@pytest.mark.parametrize("fail_at", range(6))
def test_another_process_begins_again_after_a_failure_anywhere(tmp_path: Path, fail_at: int) -> None:
    log = filled(tmp_path)
    first = Remembering(fail_at)
    with pytest.raises(OSError, match="gone"):
        log.deliver(first, has_ended=True)
    log.release()
    second = Remembering()
    later = OfflineLog(tmp_path)
    assert later.address == ADDRESS
    later.deliver(second, has_ended=True)
    # Files go once they are taken, everything else comes again from the start.
    assert second.written == [one for one in EVERYTHING if fail_at < 5 or one != ("notes/late.txt", "late")]
    assert later.is_empty


def test_the_same_process_goes_on_where_it_failed(tmp_path: Path) -> None:
    log = filled(tmp_path)
    with pytest.raises(OSError, match="gone"):
        log.deliver(Remembering(fail_at=3), has_ended=True)
    log.keep_points([point(3)])
    second = Remembering()
    log.deliver(second, has_ended=True)
    assert second.written == [[("a", 2, 0.5)], [("a", 3, 0.5)], ("notes/late.txt", "late"), ("FINISHED", 7)]


def test_a_run_that_goes_on_has_no_ending(tmp_path: Path) -> None:
    writer = Remembering()
    filled(tmp_path).deliver(writer, has_ended=False)
    assert writer.written == EVERYTHING[:-1]


def test_more_points_than_one_write_takes(tmp_path: Path) -> None:
    log = OfflineLog(tmp_path, ADDRESS)
    for step in range(2345):
        log.keep_points([point(step)])
    writer = Remembering()
    log.deliver(writer, has_ended=True)
    assert [len(part) for part in writer.written] == [1000, 1000, 345]


def test_no_json_number_is_lost(tmp_path: Path) -> None:
    log, values = OfflineLog(tmp_path, ADDRESS), [0.1, math.nan, math.inf, -math.inf]
    log.keep_points([point(step, value) for step, value in enumerate(values)])
    lines = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert lines[0] == {"store": "http://***@host", "run_id": "run"}
    assert lines[1] == {"key": "a", "step": 0, "value": 0.1, "time_ms": 1}
    writer = Remembering()
    log.deliver(writer, has_ended=True)
    assert str([value for _, _, value in writer.written[0]]) == str(values)


def test_a_line_that_a_kill_cut_short_is_none(tmp_path: Path) -> None:
    log = OfflineLog(tmp_path, ADDRESS)
    log.keep_points([point(0), point(1)])
    log.release()
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-5])
    (tmp_path / FILES).mkdir()
    (tmp_path / FILES / ".undelivered.new.half").write_text("ha")
    later = OfflineLog(tmp_path)
    assert later.count() == PendingCount(1, 0)
    later.keep_points([point(2)])
    writer = Remembering()
    later.deliver(writer, has_ended=True)
    assert writer.written == [[("a", 0, 0.5), ("a", 2, 0.5)]]
    assert later.is_empty


def _held_elsewhere(folder: Path, told: Any) -> None:
    told.send(OfflineLog(folder).hold())


def test_one_process_at_a_time(tmp_path: Path) -> None:
    log = filled(tmp_path)
    here, there = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    for expected in (False, True):
        other = spawn.Process(target=_held_elsewhere, args=(tmp_path, there))
        other.start()
        other.join()
        assert here.recv() is expected
        log.release()


@pytest.mark.parametrize("text", ["", "[]\n", '{"key": "a"}\n', "no json\n"])
def test_a_journal_without_its_first_line_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / JOURNAL).write_text(text)
    with pytest.raises(UserError, match="names no store and run"):
        _ = OfflineLog(tmp_path).address
