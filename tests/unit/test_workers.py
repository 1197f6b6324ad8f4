"""Threads that work in the background: their order, errors and priorities, the interpreter's end, and a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from fastckpt import load
from fastckpt.host import threads
from fastckpt.host.threads import WorkerPool, exit_timeout_s, hurried, start_thread

ROOT = Path(__file__).parents[2]
SHORT_S = 30.0  # no wait of these tests comes near it
NOBODY = 65534

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


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


# -- in processes of their own -----------------------------------------------------------------------------------------


def start(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    return subprocess.run(
        # torch 2.6 leaves a temporary folder of its own to a forked child's end.
        [
            sys.executable,
            "-W",
            "error",
            "-W",
            "ignore:Implicitly cleaning up:ResourceWarning",
            "-c",
            textwrap.dedent(script),
            *arguments,
        ],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@linux
def test_an_ordinary_user_can_do_that_too() -> None:
    done = start(
        f"""
        import os, sys, threading
        from fastckpt.host.threads import WorkerPool, hurried
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid({NOBODY})
            os.setuid({NOBODY})
        def priority(pool, n):
            meeting = threading.Barrier(n)
            def own():
                meeting.wait(20)
                return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            return sorted(future.result() for future in [pool.submit(own) for _ in range(n)])
        ordinary = os.getpriority(os.PRIO_PROCESS, 0)
        pool = WorkerPool(2, "test", nice=9)
        assert priority(pool, 2) == [9, 9]
        with hurried():
            assert priority(pool, 4) == [ordinary, ordinary, 9, 9]
        pool.close()
        print(os.getuid())
        """
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == (os.getuid() or NOBODY)


def test_the_end_of_a_script_waits_for_save_async(tmp_path: Path) -> None:
    done = start(
        """
        import sys, threading, torch, fastckpt
        from fastckpt.host import threads
        from fastckpt.writing import background
        real = background.write
        def late(*arguments):
            assert threading.current_thread() is not threading.main_thread()
            ended.wait()
            return real(*arguments)
        ended = threading.Event()
        background.write = late
        threading._register_atexit(ended.set)  # before our own wait: last registered, first called
        fastckpt.save_async({"t": torch.arange(3_000_000)}, sys.argv[1])
        """,
        str(tmp_path / "state"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert load(tmp_path / "state")["t"].sum().item() == 3_000_000 * 2_999_999 // 2


@pytest.mark.parametrize("leave", ["", "sys.exit(0)"], ids=["end", "exit"])
def test_the_end_of_a_script_waits_for_a_checkpointers_save(tmp_path: Path, leave: str) -> None:
    done = start(
        f"""
        import sys, threading, torch, fastckpt
        from fastckpt.store.local import LocalStore
        ended, put = threading.Event(), LocalStore.put
        def late(self, key, data):
            if key.startswith("data/"):
                ended.wait()
            put(self, key, data)
        LocalStore.put = late
        threading._register_atexit(ended.set)
        ckpt = fastckpt.Checkpointer(sys.argv[1], {{"t": torch.arange(1000)}}, every=None, spot=None)
        ckpt.save_now(7)
        {leave}
        """,
        str(tmp_path / "run"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    import torch

    t = torch.zeros(1000, dtype=torch.int64)
    from fastckpt import Checkpointer

    with Checkpointer(tmp_path / "run", {"t": t}, every=None, spot=None) as ckpt:
        assert ckpt.restore() == 7
    assert torch.equal(t, torch.arange(1000))


HANGING = """
    import sys, threading, time, torch, fastckpt
    from fastckpt.store.memory import MemoryStore
    class Hanging(MemoryStore):
        def put(self, key, data):
            if key.startswith("data/"):
                reached.set()
                threading.Event().wait()
            super().put(key, data)
    reached = threading.Event()
    ckpt = fastckpt.Checkpointer(Hanging(), {"t": torch.arange(1000)}, every=None, spot=None)
    ckpt.save_now(7)
    assert reached.wait(20)
"""


def test_a_store_that_hangs_keeps_no_process() -> None:
    began = time.monotonic()
    done = start(HANGING, FASTCKPT_EXIT_TIMEOUT_S="1")
    assert done.returncode == 0, done.stderr
    assert "the process ends with saves under way, 1 s after its main thread" in done.stderr
    assert "fastckpt-checkpointer" in done.stderr
    assert "not committed. FASTCKPT_EXIT_TIMEOUT_S gives them longer" in done.stderr
    assert time.monotonic() - began < SHORT_S


def test_a_store_that_hangs_keeps_no_checkpointer() -> None:
    done = start(HANGING + "    ckpt.close()\n", FASTCKPT_EXIT_TIMEOUT_S="0.5")
    assert done.returncode == 1
    assert "SaveError: saves of steps [7] were not durable after FASTCKPT_EXIT_TIMEOUT_S = 0.5 s" in done.stderr


def test_the_time_for_that_is_read_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(threads.ENV_EXIT_TIMEOUT, "2.5")
    assert exit_timeout_s() == 2.5
    monkeypatch.setenv(threads.ENV_EXIT_TIMEOUT, "soon")
    assert exit_timeout_s() == threads.EXIT_TIMEOUT_S
    assert "FASTCKPT_EXIT_TIMEOUT_S is 'soon': expected seconds" in caplog.text
    monkeypatch.delenv(threads.ENV_EXIT_TIMEOUT)
    assert exit_timeout_s() == 600


@forks
def test_a_forked_child_trains_on_and_the_parents_save_is_whole(tmp_path: Path) -> None:
    """The fork comes while a snapshot is being copied by threads that the child does not have."""
    done = start(
        """
        import os, sys, threading, warnings, torch, fastckpt
        from fastckpt.state import Captured
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)  # Python 3.12: this process has threads
        torch.manual_seed(0)
        model = torch.nn.Linear(1000, 1000)
        optim = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        def backward():
            model(torch.ones(2, 1000)).square().mean().backward()
        copying, go, read = threading.Event(), threading.Event(), Captured.read
        def held(self, pieces, out):
            if threading.current_thread().name.startswith("fastckpt-stage"):
                copying.set()
                assert go.wait(20)
            read(self, pieces, out)
        options = fastckpt.Options(threads=1, connections=1, verify_snapshot="off")
        ckpt = fastckpt.Checkpointer(sys.argv[1], {"m": model, "o": optim}, every=None, spot=None, options=options)
        backward()
        optim.step()
        Captured.read = held
        handle = ckpt.save_now(1)
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        assert copying.wait(20)
        backward()
        child = os.fork()
        if not child:
            optim.step()
            assert not torch.equal(model.weight, expected["weight"])
            for call in (lambda: ckpt.step(2), lambda: ckpt.save_now(2), ckpt.wait, ckpt.restore):
                try:
                    call()
                except fastckpt.CheckpointError as error:
                    words = str(error)
                    assert f"belongs to process {os.getppid()}" in words and f"a fork of it ({os.getpid()})" in words, words
                else:
                    os._exit(3)
            ckpt.close()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        go.set()
        optim.step()
        handle.wait(20)
        ckpt.close()
        other = torch.nn.Linear(1000, 1000)
        optim = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
        with fastckpt.Checkpointer(sys.argv[1], {"m": other, "o": optim}, every=None, spot=None) as ckpt:
            assert ckpt.restore() == 1
        assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())
        """,
        str(tmp_path / "run"),
    )
    assert (done.returncode, done.stderr) == (0, "")


@forks
def test_a_forked_child_ends_without_waiting_for_its_parents_saves() -> None:
    done = start(
        HANGING
        + """
    import os, warnings
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
    from fastckpt.host.threads import WorkerPool, hurried
    child = os.fork()
    if not child:
        pool = WorkerPool(1, "mine", nice=3)
        with hurried():
            assert pool.submit(lambda: 4).result(20) == 4
        pool.close()
        sys.exit(5)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
        FASTCKPT_EXIT_TIMEOUT_S="0",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "5"
    assert done.stderr.count("the process ends with saves under way") == 1, "the parent's"


def test_threads_that_have_ended_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    start_thread(lambda: None, "short").join(SHORT_S)
    ended: Callable[[], object] = threads._wait
    monkeypatch.setenv(threads.ENV_EXIT_TIMEOUT, "0")
    ended()
    start_thread(lambda: None, "next").join(SHORT_S)
    assert not [thread for thread in threads._unfinished if thread.name == "short"]
