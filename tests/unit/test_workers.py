"""Threads that work in the background: their order, errors and priorities, the interpreter's end, and a fork."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import pytest

from fastckpt.host import threads
from fastckpt.host.threads import WorkerPool, hurried, start_thread

SHORT_S = 30.0  # no wait of these tests comes near it
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    made = WorkerPool(2, "test")
    yield made
    made.close()


# -- the pool ----------------------------------------------------------------------------------------------------------


def test_one_thread_works_in_order() -> None:
    made, done = WorkerPool(1, "test"), list[int]()
    futures = [made.submit(lambda n=n: done.append(n)) for n in range(100)]  # type: ignore[misc]
    for future in futures:
        future.result(SHORT_S)
    made.close()
    assert done == list(range(100))


def test_all_threads_work_at_once(pool: WorkerPool) -> None:
    meeting = threading.Barrier(2)
    names = [future.result(SHORT_S) for future in [pool.submit(lambda: _meet(meeting)) for _ in range(2)]]
    assert sorted(names) == ["test-0", "test-1"]


def _meet(meeting: threading.Barrier) -> str:
    meeting.wait(SHORT_S)
    return threading.current_thread().name


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_errors_reach_the_future_and_the_thread_goes_on(pool: WorkerPool, error: BaseException) -> None:
    def fail() -> None:
        raise error

    failed = [pool.submit(fail) for _ in range(4)]
    for future in failed:
        assert future.exception(SHORT_S) is error
    assert pool.submit(lambda: 5).result(SHORT_S) == 5


def test_close_lets_what_has_begun_end_and_cancels_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    made = WorkerPool(1, "test")
    begun, go = threading.Event(), threading.Event()

    def long() -> str:
        begun.set()
        assert go.wait(SHORT_S)
        return "ended"

    first, second = made.submit(long), made.submit(lambda: "never")
    assert begun.wait(SHORT_S)
    join = threading.Thread.join

    def joined(self: threading.Thread, timeout: float | None = None) -> None:  # the last act of `close`
        go.set()
        join(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", joined)
    made.close()
    assert first.result(0) == "ended"
    assert second.cancelled()
    with pytest.raises(CancelledError):
        second.result(0)
    made.close()  # may be called twice


def test_no_thread_outlives_its_pool() -> None:
    before = set(threading.enumerate())
    made = WorkerPool(3, "test", nice=5)
    with hurried():
        assert len(set(threading.enumerate()) - before) == 6
    made.close()
    assert set(threading.enumerate()) <= before
    assert made not in threads._pools


def test_what_a_call_held_is_let_go_before_the_next_one_comes(pool: WorkerPool) -> None:
    import weakref

    class Large:
        pass

    held = Large()
    gone = threading.Event()
    weakref.finalize(held, gone.set)
    future = pool.submit(lambda held=held: None)  # type: ignore[misc]
    future.result(SHORT_S)
    del held, future
    assert gone.wait(SHORT_S)


def test_a_thread_that_cannot_be_started_is_an_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before, started = set(threading.enumerate()), list[int]()
    start = threading.Thread.start

    def second_fails(self: threading.Thread) -> None:
        started.append(1)
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        WorkerPool(3, "test", nice=5)
    assert set(threading.enumerate()) <= before


# -- priorities --------------------------------------------------------------------------------------------------------


def priority(pool: WorkerPool, n: int) -> list[int]:
    """Of each of its n threads: what the kernel says, and what `nice` says of oneself."""
    meeting = threading.Barrier(n)

    def own() -> int:
        meeting.wait(SHORT_S)
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    return sorted(future.result(SHORT_S) for future in [pool.submit(own) for _ in range(n)])


@linux
def test_threads_in_the_background_give_way_until_somebody_waits() -> None:
    ordinary = os.getpriority(os.PRIO_PROCESS, 0)
    made = WorkerPool(2, "test", nice=7)
    try:
        assert priority(made, 2) == [7, 7]
        with hurried():
            assert priority(made, 4) == [ordinary, ordinary, 7, 7]
            late = WorkerPool(2, "late", nice=7)  # made while somebody waits
            assert priority(late, 2) == [ordinary, ordinary]
            late.close()
            with hurried():
                assert priority(made, 4) == [ordinary, ordinary, 7, 7], "once is enough"
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == ordinary
    finally:
        made.close()
    after = WorkerPool(1, "after", nice=7)
    assert priority(after, 1) == [7]
    after.close()


@linux
def test_a_pool_that_gives_way_to_nobody_gets_no_more_threads() -> None:
    made = WorkerPool(1, "test")
    with hurried():
        assert len(made._threads) == 1
    assert priority(made, 1) == [os.getpriority(os.PRIO_PROCESS, 0)]
    made.close()


def test_threads_that_have_ended_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    start_thread(lambda: None, "short").join(SHORT_S)  # type: ignore[union-attr]
    ended: Callable[[], object] = threads._wait
    monkeypatch.setenv(threads.ENV_EXIT_TIMEOUT, "0")
    ended()
    start_thread(lambda: None, "next").join(SHORT_S)  # type: ignore[union-attr]
    assert not [thread for thread in threads._unfinished if thread.name == "short"]
