"""Ranged reads under way at once: buffers, hedges, errors, the end."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from fastckpt._types import U8
from fastckpt.errors import StoreUnavailableError
from fastckpt.reading.hedging import Hedging
from fastckpt.reading.range_reads import RangeReads
from fastckpt.reading.ranges import Range

_N = 1000
_WAIT_S = 30.0
AT_ONCE = Hedging(times=0.0, least_s=0.0, samples=1, unknown_s=0.0, share=0.0)
"""The oldest read is slow as soon as a thread is idle; one hedge is allowed."""


def ranges(n: int, n_bytes: int = _N) -> list[Range]:
    return [Range(0, at * n_bytes, (at + 1) * n_bytes, (at,)) for at in range(n)]


def content(range_: Range) -> U8:
    return np.full(range_.stop - range_.start, 1 + range_.start // _N % 250, np.uint8)


class Used:
    """Takes what was read; `wait` until there is so much of it."""

    def __init__(self) -> None:
        self.found: dict[Range, bytes | BaseException] = {}
        self._changed = threading.Condition()

    def __call__(self, range_: Range, data: U8 | BaseException) -> None:
        with self._changed:
            assert range_ not in self.found, "used twice"
            self.found[range_] = data if isinstance(data, BaseException) else data.tobytes()
            self._changed.notify_all()

    def wait(self, n: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.found) >= n, _WAIT_S)

    def is_right(self) -> bool:
        return all(data == content(range_).tobytes() for range_, data in self.found.items())


def reads_of(
    read: Callable[[Range, U8], None], used: Used, hedging: Hedging | None = None, *, at_once: int = 4, room: int = 8
) -> RangeReads:
    return RangeReads(read, used, at_once=at_once, buffers_bytes=room * _N, hedging=hedging)


def plain(range_: Range, out: U8) -> None:
    out[:] = content(range_)


def test_every_range_is_read_once_in_bounded_memory() -> None:
    used, most, now, lock = Used(), 0, 0, threading.Lock()

    def counting(range_: Range, out: U8) -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        plain(range_, out)
        with lock:
            now -= 1

    reads = reads_of(counting, used, at_once=16, room=3)
    for one in ranges(200):
        reads.submit(one)
    used.wait(200)
    reads.close()
    assert used.is_right()
    assert most <= 3, "more buffers than there is room for"
    assert reads._held_bytes <= 3 * _N


def test_a_range_longer_than_all_buffers_is_read_alone() -> None:
    used = Used()
    reads = reads_of(plain, used, room=2)
    mixed = [
        *ranges(3),
        Range(0, 10 * _N, 20 * _N, (9,)),
        *[Range(0, at * _N, (at + 1) * _N, (at,)) for at in (30, 31)],
    ]
    for one in mixed:
        reads.submit(one)
    used.wait(len(mixed))
    reads.close()
    assert used.is_right()


class Stuck:
    """The first read of one range goes on only when it is told to, and then writes into its buffer."""

    def __init__(self, which: Range) -> None:
        self.which, self.tries = which, 0
        self.go_on, self.has_ended, self.began = threading.Event(), threading.Event(), threading.Event()
        self.buffers: list[int] = []
        self._lock = threading.Lock()

    def __call__(self, range_: Range, out: U8) -> None:
        if range_ == self.which:
            with self._lock:
                self.tries += 1
                is_first = self.tries == 1
                self.buffers.append(out.__array_interface__["data"][0])
            if is_first:
                self.began.set()
                assert self.go_on.wait(_WAIT_S)
                out[:] = 255
                self.has_ended.set()
                return
        plain(range_, out)


def late_writer() -> tuple[Used, RangeReads]:
    """A hedge wins; then the loser writes while another range lies in a buffer, before that is used."""
    first, *others = ranges(3)
    stuck, used = Stuck(first), Used()

    def read(range_: Range, out: U8) -> None:
        stuck(range_, out)
        if range_ == others[1]:
            stuck.go_on.set()
            assert stuck.has_ended.wait(_WAIT_S)

    reads = reads_of(read, used, AT_ONCE, at_once=2, room=4)
    reads.submit(first)
    assert stuck.began.wait(_WAIT_S)
    reads.submit(others[0])
    used.wait(2)
    reads.submit(others[1])
    used.wait(3)
    reads.close()
    assert stuck.tries == 2
    assert len(set(stuck.buffers)) == 2, "a hedge and its original share memory"
    return used, reads


def test_a_slow_read_is_made_again_and_its_late_bytes_go_nowhere() -> None:
    used, _ = late_writer()
    assert used.is_right()


def test_the_test_above_sees_a_buffer_that_is_free_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug switch: buffers are free when the winner has ended."""
    monkeypatch.setattr(RangeReads, "_may_free", lambda self, wanted: wanted.is_settled and not wanted.is_in_use)
    used, _ = late_writer()
    assert not used.is_right()


def test_nobody_waits_for_a_read_that_has_lost() -> None:
    first = ranges(1)[0]
    stuck, used = Stuck(first), Used()
    reads = reads_of(stuck, used, AT_ONCE)
    reads.submit(first)
    assert stuck.began.wait(_WAIT_S)
    reads.submit(ranges(2)[1])  # its thread is the one that makes the hedge
    used.wait(2)
    reads.close()
    assert not stuck.has_ended.is_set()
    stuck.go_on.set()
    assert stuck.has_ended.wait(_WAIT_S)
    assert used.is_right()


def test_an_error_is_given_only_when_no_attempt_can_succeed_any_more() -> None:
    first, second = ranges(2)
    failed, tries, lock = threading.Event(), 0, threading.Lock()

    def read(range_: Range, out: U8) -> None:
        nonlocal tries
        if range_ == second:
            plain(range_, out)
            return
        with lock:
            tries += 1
            mine = tries
        if mine == 1:
            assert hedged.wait(_WAIT_S)
            failed.set()
            raise StoreUnavailableError("broken")
        hedged.set()
        assert failed.wait(_WAIT_S)
        plain(range_, out)

    hedged, used = threading.Event(), Used()
    reads = reads_of(read, used, AT_ONCE, at_once=2)
    reads.submit(first)
    reads.submit(second)
    used.wait(2)
    reads.close()
    assert used.is_right()


def test_an_error_reaches_whoever_wants_the_range() -> None:
    def read(range_: Range, out: U8) -> None:
        raise EOFError("short")

    used = Used()
    reads = reads_of(read, used)
    for one in ranges(3):
        reads.submit(one)
    used.wait(3)
    reads.close()
    assert all(isinstance(found, EOFError) for found in used.found.values())


def test_what_has_not_begun_is_dropped_at_the_end_and_nothing_is_used_after_it() -> None:
    began, go_on, used = threading.Event(), threading.Event(), Used()

    def read(range_: Range, out: U8) -> None:
        began.set()
        assert go_on.wait(_WAIT_S)
        plain(range_, out)

    reads = reads_of(read, used, at_once=1)
    for one in ranges(5):
        reads.submit(one)
    assert began.wait(_WAIT_S)
    closing = threading.Thread(target=reads.close)
    closing.start()
    while not reads._is_closed:
        threading.Event().wait(0.001)
    go_on.set()
    closing.join(_WAIT_S)
    assert not closing.is_alive()
    assert used.found == {}


def test_without_threads_ranges_are_read_on_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastckpt.reading.range_reads.start", lambda thread: False)
    used = Used()
    reads = reads_of(plain, used)
    for n, one in enumerate(ranges(3)):
        reads.submit(one)
        assert len(used.found) == n + 1
    reads.close()
    assert used.is_right()


def test_when_a_read_is_slow() -> None:
    rule = Hedging()
    assert rule.slow_after_s([0.1] * 7) == rule.unknown_s
    assert rule.slow_after_s([0.01] * 8) == rule.least_s
    assert rule.slow_after_s([1.0] * 7 + [50.0]) == 4.0
    assert [rule.allows(0, 1), rule.allows(1, 20), rule.allows(1, 21), rule.allows(5, 100)] == [
        True,
        False,
        True,
        False,
    ]


def test_the_end_after_an_error_does_not_wait_for_a_read_without_an_answer() -> None:
    began, answers, used = threading.Event(), threading.Event(), Used()

    def failing(range_: Range, out: U8) -> None:
        if range_.start == 0:
            raise StoreUnavailableError("as the test wants it")
        began.set()
        assert answers.wait(_WAIT_S)
        plain(range_, out)

    reads = reads_of(failing, used)
    for one in ranges(2):
        reads.submit(one)
    used.wait(1)
    assert began.wait(_WAIT_S)
    closing = threading.Thread(target=reads.close)
    closing.start()
    closing.join(_WAIT_S / 10)
    answers.set()
    assert not closing.is_alive()
    for thread in threading.enumerate():
        if thread.name == "fastckpt-read":
            thread.join(_WAIT_S)
    assert list(used.found) == ranges(1), "nothing is used after the end"
