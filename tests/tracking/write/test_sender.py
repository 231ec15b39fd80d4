"""The sender with a writer that remembers: when it sends, how it waits, what it does at the end."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_moevlm.tracking.write import sender as module
from lightning_moevlm.tracking.write.offline_log import Address, OfflineLog, find_offline_logs
from lightning_moevlm.tracking.write.sender import Sender
from lightning_moevlm.tracking.write.store_outage import OutageGuard
from tests.tracking.write.test_offline_log import Remembering, log_point

ADDRESS = Address("http://host", "run")


class Store(Remembering):
    """failure: raised by every write while it is set."""

    failure: Exception | None = None

    def _take(self, what: object) -> None:
        if what and self.failure is not None:
            raise self.failure
        super()._take(what)


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def sending(
    run_dir: Path, store: Store, flush_points: int = 10**6, flush_seconds: float = 3600.0
) -> Iterator[tuple[Sender, list[str]]]:
    lines: list[str] = []
    earlier = [log for log in find_offline_logs(run_dir) if log.hold()]
    guard = OutageGuard("http://user:secret@host", lines.append, "training continues")
    log = OfflineLog.begin(run_dir, ADDRESS)
    sender = Sender(log, earlier, lambda: store, guard, flush_points, flush_seconds)  # type: ignore[arg-type,return-value]
    sender.start()
    yield sender, lines
    assert sender._thread.is_alive()
    sender.close()
    assert not sender._thread.is_alive()


def test_points_are_sent_when_there_are_enough(tmp_path: Path) -> None:
    store = Store()
    with sending(tmp_path, store, flush_points=3) as (sender, _):
        for step in range(2):
            log_point(sender.log, step)
            sender.notice(1)
        time.sleep(0.1)
        assert store.written == []
        log_point(sender.log, 2)
        sender.notice(1)
        wait_until(lambda: store.written)
        assert store.written == [[("a", 0, 0.5), ("a", 1, 0.5), ("a", 2, 0.5)]]
        log_point(sender.log, 3)
        sender.notice(1)
        time.sleep(0.1)
        assert len(store.written) == 1  # the next three are counted anew
    assert store.written[1:] == [[("a", 3, 0.5)]]
    assert list(tmp_path.iterdir()) == []


def test_points_are_sent_after_a_while_and_tags_at_once(tmp_path: Path) -> None:
    store = Store()
    with sending(tmp_path, store, flush_seconds=0.3) as (sender, _):
        log_point(sender.log, 0)
        sender.notice(1)
        wait_until(lambda: store.written)
    store = Store()
    with sending(tmp_path, store) as (sender, _):
        log_point(sender.log, 0)
        sender.log.append(tags={"a": "b"})
        sender.notice()
        wait_until(lambda: len(store.written) == 2)
        assert store.written == [{"a": "b"}, [("a", 0, 0.5)]]


def test_with_no_seconds_to_wait_every_call_is_sent(tmp_path: Path) -> None:
    store = Store()
    with sending(tmp_path, store, flush_seconds=0.0) as (sender, _):
        for step in range(3):
            log_point(sender.log, step)
            sender.notice(1)
            wait_until(lambda step=step: len(store.written) == step + 1)


def test_a_store_that_fails_is_left_alone_for_longer_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    store.failure = OSError("gone")
    with sending(tmp_path, store, flush_seconds=5.0) as (sender, lines):
        log_point(sender.log, 0)
        pauses = []
        for _ in range(6):
            assert not sender.flush()
            pauses.append(sender._pause)
        assert pauses == [5, 10, 20, 40, 60, 60]
        assert lines == ["MLflow at http://***@host is unavailable; training continues: gone"]
        store.failure = None
        assert sender.flush()
        assert (sender._pause, store.written) == (0, [[("a", 0, 0.5)]])


def test_an_outage_costs_no_point_and_no_call_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    store.failure = OSError("gone")
    monkeypatch.setattr(module, "_LONGEST_PAUSE", 0.05)
    with sending(tmp_path, store, flush_points=1) as (sender, lines):
        for step in range(100):
            log_point(sender.log, step)
            sender.notice(1)
        wait_until(lambda: lines)
        store.failure = None
        wait_until(lambda: sum(map(len, store.written)) == 100)
        assert [step for part in store.written for _, step, _ in part] == list(range(100))


def test_logs_of_killed_processes_go_first(tmp_path: Path) -> None:
    for step in range(2):
        log = OfflineLog.begin(tmp_path, ADDRESS)
        log_point(log, step)
        log.append(status="FAILED", end_ms=1)  # says nothing in a run that continues
        log.release()
        time.sleep(0.002)  # their order is that of their names, in milliseconds
    store = Store()
    with sending(tmp_path, store) as (sender, _):
        log_point(sender.log, 2)
        assert sender.flush()
    assert store.written == [[("a", step, 0.5)] for step in range(3)]
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_sent_at_the_end_stays_and_is_free_for_others(tmp_path: Path) -> None:
    store = Store()
    with sending(tmp_path, store) as (sender, _):
        store.failure = OSError("gone")
        log_point(sender.log, 0)
    [left] = find_offline_logs(tmp_path)
    assert left.hold() and left.count().points == 1


def test_the_failure_of_another_kind_reaches_the_training(tmp_path: Path) -> None:
    store = Store()
    store.failure = ZeroDivisionError()
    with sending(tmp_path, store, flush_points=1) as (sender, _):
        log_point(sender.log, 0)
        sender.notice(1)
        sender._thread.join()
        with pytest.raises(ZeroDivisionError):
            sender.notice(1)
        store.failure = None
        sender._thread = threading.Thread(name="Sender", target=sender._is_closing.wait)
        sender._thread.start()


def test_a_forked_child_leaves_the_log_to_its_parent(tmp_path: Path) -> None:
    store = Store()
    with sending(tmp_path, store) as (sender, _):
        log_point(sender.log, 0)
        child = os.fork()
        if child == 0:
            os._exit(0 if not sender.close() and not store.written else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert find_offline_logs(tmp_path)
    assert store.written == [[("a", 0, 0.5)]]
