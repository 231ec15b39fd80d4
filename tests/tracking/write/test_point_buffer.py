from collections.abc import Sequence

import pytest

from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.write.point_buffer import PointBuffer


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def point(step: int, value: float = 0.5) -> Point:
    return Point("a", step, value, 1)


def test_due_by_number_or_time() -> None:
    clock = Clock()
    buffer = PointBuffer(flush_points=3, flush_seconds=5.0, clock=clock)
    clock.now += 60
    assert not buffer.due  # nothing waits
    buffer.deliver(lambda points: None, per_write=10)
    buffer.add(point(0))
    assert not buffer.due
    clock.now += 5
    assert buffer.due
    buffer.deliver(lambda points: None, per_write=10)
    for step in range(3):
        assert not buffer.due
        buffer.add(point(step))
    assert buffer.due


def test_order_and_size_of_writes() -> None:
    buffer = PointBuffer(flush_points=1, flush_seconds=1.0)
    written: list[list[int]] = []
    for step in range(7):
        buffer.add(point(step))
    buffer.deliver(lambda points: written.append([p.step for p in points]), per_write=3)
    assert written == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(buffer) == 0


def test_a_failed_write_keeps_its_points_and_waits_longer() -> None:
    clock = Clock()
    buffer = PointBuffer(flush_points=1, flush_seconds=5.0, clock=clock)
    for step in range(5):
        buffer.add(point(step))
    written: list[int] = []

    def once(points: Sequence[Point]) -> None:
        if written:
            raise OSError("gone")
        written.extend(p.step for p in points)

    with pytest.raises(OSError, match="gone"):
        buffer.deliver(once, per_write=2)
    assert (written, len(buffer)) == ([0, 1], 3)
    pauses = []
    for _ in range(6):
        assert not buffer.due  # although more than flush_points wait
        pause = 0
        while not buffer.due:
            clock.now += 1
            pause += 1
        pauses.append(pause)
        with pytest.raises(OSError, match="gone"):
            buffer.deliver(once, per_write=2)
    assert pauses == [5, 10, 20, 40, 60, 60]
    buffer.deliver(lambda points: written.extend(p.step for p in points), per_write=2)
    assert written == [0, 1, 2, 3, 4]
    buffer.add(point(5))
    assert buffer.due


def test_older_things_go_first_and_their_failure_is_one_of_the_attempt() -> None:
    clock = Clock()
    buffer = PointBuffer(flush_points=1, flush_seconds=5.0, clock=clock)
    buffer.add(point(0))
    written: list[str] = []

    def fail() -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        buffer.deliver(lambda points: written.append("points"), per_write=2, first=fail)
    assert (written, len(buffer), buffer.due) == ([], 1, False)
    buffer.deliver(lambda points: written.append("points"), per_write=2, first=lambda: written.append("older"))
    assert written == ["older", "points"]


def test_spilled_points_have_left_and_the_next_attempt_still_waits() -> None:
    clock = Clock()
    buffer = PointBuffer(flush_points=1, flush_seconds=5.0, clock=clock)
    buffer.add(point(0))
    with pytest.raises(ZeroDivisionError):
        buffer.deliver(lambda points: 1 / 0, per_write=2)
    kept: list[Point] = []
    buffer.spill(kept.extend)
    assert (kept, len(buffer), buffer.due) == ([point(0)], 0, False)
    clock.now += 5
    assert buffer.due  # nothing waits here, but elsewhere


def test_points_that_could_not_be_spilled_stay() -> None:
    buffer = PointBuffer(flush_points=1, flush_seconds=5.0)
    buffer.add(point(0))

    def full(points: Sequence[Point]) -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        buffer.spill(full)
    assert len(buffer) == 1
