"""Ends of processes, forks, threads: a save that was acknowledged is there, and saves do not hurt each other."""

from __future__ import annotations

import errno
import gc
import io
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import fastckpt
from tests.crash import tools

OLD, NEW = 1, 2
ROOT = Path(__file__).parents[2]
LARGE = 20_000  # rows: 16 MB, saved by several threads


def run_script(text: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", text, str(path), str(LARGE)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.mark.parametrize("rows", [120, LARGE])
def test_exit_right_after_save(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "a"
    fastckpt.save(tools.state(OLD, rows), path)

    def child() -> None:
        fastckpt.save(tools.state(NEW, rows), path)
        os._exit(0)

    assert tools.exit_status(tools.fork(child)) == 0
    assert tools.loaded(path, rows) == NEW
    assert tools.debris(path) == []


@pytest.mark.parametrize("rows", [120, LARGE])
def test_exit_right_after_wait(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "a"

    def child() -> None:
        n_bytes = fastckpt.save_async(tools.state(NEW, rows), path).wait()
        os._exit(0 if n_bytes == path.stat().st_size else 2)

    assert tools.exit_status(tools.fork(child)) == 0
    assert tools.loaded(path, rows) == NEW


# About 4 s: a new interpreter imports torch.
@pytest.mark.parametrize("ending", ["", "sys.exit(0)", "del state"], ids=["falls off", "sys.exit", "state deleted"])
def test_script_ends_during_save_async(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "a"
    script = f"""
import sys, fastckpt
from tests.crash import tools
state = tools.state({NEW}, int(sys.argv[2]))
fastckpt.save_async(state, sys.argv[1])
{ending}
"""
    done = run_script(script, path)
    assert (done.returncode, done.stderr) == (0, "")
    assert tools.loaded(path, LARGE) == NEW
    assert tools.debris(path) == []


def test_script_that_raises_during_save_async(tmp_path: Path) -> None:
    path = tmp_path / "a"
    script = f"""
import sys, fastckpt
from tests.crash import tools
fastckpt.save_async(tools.state({NEW}, int(sys.argv[2])), sys.argv[1])
raise RuntimeError("training failed")
"""
    done = run_script(script, path)
    assert done.returncode == 1
    assert "training failed" in done.stderr
    assert tools.loaded(path, LARGE) == NEW


@pytest.mark.parametrize("rows", [120, LARGE])
def test_forked_child_saves_and_loads(tmp_path: Path, rows: int) -> None:
    parents, childs = tmp_path / "parent", tmp_path / "child"
    fastckpt.save(tools.state(OLD, rows), parents)
    fastckpt.save_async(tools.state(OLD, rows), parents).wait()
    assert tools.loaded(parents, rows) == OLD

    def child() -> None:
        assert tools.loaded(parents, rows) == OLD
        fastckpt.save(tools.state(NEW, rows), childs)
        assert tools.loaded(childs, rows) == NEW
        fastckpt.save_async(tools.state(NEW + 1, rows), childs).wait()
        assert tools.loaded(childs, rows) == NEW + 1

    assert tools.exit_status(tools.fork(child)) == 0
    assert tools.loaded(childs, rows) == NEW + 1
    fastckpt.save(tools.state(NEW, rows), parents)
    assert tools.loaded(parents, rows) == NEW


def test_fork_in_the_middle_of_save_async(tmp_path: Path) -> None:
    """A child born while the parent's save runs: it can save itself, and its end harms nothing."""
    parents, childs = tmp_path / "parent", tmp_path / "child"
    writing, go_on = threading.Event(), threading.Event()

    def stop_once(name: str, _: tuple[Any, ...]) -> None:
        if name == "fsync" and not writing.is_set():
            writing.set()
            assert go_on.wait(60)

    with tools.watched(stop_once, write_bytes=16 << 20):
        handle = fastckpt.save_async(tools.state(OLD, LARGE), parents)
        assert writing.wait(60)

        def child() -> None:
            fastckpt.save(tools.state(NEW, LARGE), childs)
            assert tools.loaded(childs, LARGE) == NEW

        status = tools.exit_status(tools.fork(child))
        go_on.set()
        handle.wait(60)
    assert status == 0
    assert tools.loaded(parents, LARGE) == OLD
    assert tools.loaded(childs, LARGE) == NEW


@pytest.mark.parametrize("rows", [120, LARGE])
@pytest.mark.parametrize("operation", ["write", "fsync", "link", "rename"])
def test_async_error_reaches_handle_and_log(
    tmp_path: Path, operation: str, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a"
    fastckpt.save(tools.state(OLD, rows), path)
    fds = tools.open_fds()
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(name: str, _: tuple[Any, ...]) -> None:
        if name == operation:
            raise error

    with tools.watched(fail), caplog.at_level(logging.ERROR, "fastckpt"):
        handle = fastckpt.save_async(tools.state(NEW, rows), path)
        assert handle.staged.done()
        assert handle.durable.exception(60) is error
        assert error.filename == str(path)
        with pytest.raises(OSError, match="No space left"):
            handle.wait()
    assert handle.done()
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(messages) == 1
    assert str(path) in messages[0]
    assert "No space left" in messages[0]
    for thread in threading.enumerate():
        if thread.name.startswith("fastckpt"):
            thread.join(60)  # it has set the result and is about to end
    error.__traceback__ = None
    del handle
    gc.collect()
    assert tools.open_fds() == fds
    assert tools.our_threads() == []
    assert tools.loaded(path, rows) == OLD
    assert tools.debris(path) == []


def test_async_staging_error_is_raised_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a"
    fastckpt.save(tools.state(OLD), path)
    with pytest.raises(Exception, match=r"pickle|local"):
        fastckpt.save_async({"f": lambda: None}, path)
    assert tools.loaded(path) == OLD
    assert tools.debris(path) == []


def test_state_may_change_after_staging(tmp_path: Path) -> None:
    path = tmp_path / "a"
    state = tools.state(NEW, LARGE)
    writing, changed = threading.Event(), threading.Event()

    def hold(name: str, _: tuple[Any, ...]) -> None:
        if name == "write" and not writing.is_set():
            writing.set()
            assert changed.wait(60)

    with tools.watched(hold, write_bytes=16 << 20):
        handle = fastckpt.save_async(state, path)
        assert writing.wait(60)
        state["model"]["weight"].zero_()
        state["optimizer"]["state"][0]["exp_avg"].fill_(7)
        changed.set()
        handle.wait(60)
    assert tools.loaded(path, LARGE) == NEW


def in_threads(calls: list[Any]) -> None:
    """Run all at once; raises the first error."""
    barrier = threading.Barrier(len(calls))
    errors: list[BaseException] = []

    def run(call: Any) -> None:
        try:
            barrier.wait(60)
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("tmpfile", [True, False], ids=["unnamed", "named"])
@pytest.mark.parametrize("rows", [120, LARGE])
def test_concurrent_saves_to_one_path(tmp_path: Path, rows: int, tmpfile: bool) -> None:
    path = tmp_path / "a"
    numbers = range(10, 16)

    def save(number: int) -> None:
        for _ in range(3):
            fastckpt.save(tools.state(number, rows), path)
            assert tools.check_state(fastckpt.load(path), rows) in numbers  # never half of one, never missing

    with tools.watched(tmpfile=tmpfile, write_bytes=16 << 20):
        in_threads([lambda number=number: save(number) for number in numbers])
    assert tools.loaded(path, rows) in numbers
    assert tools.debris(path) == []


def test_concurrent_processes_to_one_path(tmp_path: Path) -> None:
    path = tmp_path / "a"
    numbers = range(10, 16)

    def child(number: int) -> None:
        for _ in range(5):
            fastckpt.save(tools.state(number), path)
            assert tools.check_state(fastckpt.load(path)) in numbers

    pids = [tools.fork(lambda number=number: child(number)) for number in numbers]
    assert [tools.exit_status(pid) for pid in pids] == [0] * len(pids)
    assert tools.loaded(path) in numbers
    assert tools.debris(path) == []


def test_concurrent_saves_to_different_paths(tmp_path: Path) -> None:
    numbers = range(10, 16)
    calls = [lambda n=n: fastckpt.save(tools.state(n, LARGE), tmp_path / str(n)) for n in numbers]
    in_threads(calls)
    assert {n: tools.loaded(tmp_path / str(n), LARGE) for n in numbers} == {n: n for n in numbers}
    assert sorted(os.listdir(tmp_path)) == sorted(map(str, numbers))


def test_concurrent_async_saves(tmp_path: Path) -> None:
    numbers = range(10, 16)
    handles = [fastckpt.save_async(tools.state(n, LARGE), tmp_path / str(n)) for n in numbers]
    for handle in handles:
        handle.wait(60)
    assert {n: tools.loaded(tmp_path / str(n), LARGE) for n in numbers} == {n: n for n in numbers}


def test_async_into_a_file_object() -> None:
    target = io.BytesIO()
    n_bytes = fastckpt.save_async(tools.state(NEW), target).wait(60)
    assert n_bytes == len(target.getvalue())
    target.seek(0)
    assert tools.check_state(fastckpt.load(target)) == NEW
