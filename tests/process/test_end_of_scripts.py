"""Threads and saves at the end of a script, in a forked child, and as an ordinary user."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fastckpt import load
from fastckpt.host import threads
from fastckpt.host.threads import exit_timeout_s

ROOT = Path(__file__).parents[2]
SHORT_S = 30.0  # no wait of these tests comes near it
NOBODY = 65534
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


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
        import fastckpt.writing.background
        real = fastckpt.writing.background.write
        def late(*arguments):
            assert threading.current_thread() is not threading.main_thread()
            ended.wait()
            return real(*arguments)
        ended = threading.Event()
        fastckpt.writing.background.write = late
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
