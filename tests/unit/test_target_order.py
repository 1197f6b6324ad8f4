"""The order of saves to one target: a later one is not overwritten by an earlier one."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastckpt
from fastckpt.errors import OvertakenError, StoreUnavailableError, TargetBusyError
from fastckpt.host import files, threads
from fastckpt.host.threads import start_thread
from fastckpt.options import Options
from fastckpt.store import late_writes
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Retrying
from fastckpt.testing.faulty_store import FaultyStore
from fastckpt.writing import background, object_sink, turns
from fastckpt.writing.ordered_sink import OrderedSink
from tests.support.targets import Gate, linux, state, step_in

IMPATIENT = Options(max_order_wait_s=0.05, threads=1)


def _names(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Two names of one target, by what makes them different."""
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    (folder / "file").symlink_to("real/x")
    relative = os.path.relpath(folder / "real" / "x")
    return {
        "same": (folder / "real" / "x", folder / "real" / "x"),
        "linked directory": (folder / "link" / "x", folder / "real" / "x"),
        "linked file": (folder / "file", folder / "real" / "x"),
        "relative": (relative, folder / "real" / "x"),
        "dots": (f"{folder}/link/../real/./x", folder / "real" / "x"),
        "file URL": (f"file://localhost{folder}/real/%78", folder / "real" / "x"),
        "file path": (Path(f"file://{folder}/real/x"), folder / "real" / "x"),
        "memory": ("memory://targets/x", Path("memory://targets/x")),
    }


@pytest.mark.parametrize("names", ["same", "linked directory", "linked file"])
@pytest.mark.parametrize("later", ["save", "save_async", "legacy"])
def test_a_later_save_is_not_overwritten_by_an_earlier_one(tmp_path: Path, gate: Gate, names: str, later: str) -> None:
    check_order(*_names(tmp_path)[names], gate, later)


@pytest.mark.parametrize("names", ["relative", "dots", "file URL", "file path", "memory"])
def test_two_names_of_a_target_are_one_target(tmp_path: Path, gate: Gate, names: str) -> None:
    check_order(*_names(tmp_path)[names], gate, "save_async")


def check_order(first: Any, second: Any, gate: Gate, later: str) -> None:
    older = fastckpt.save_async(state(1), first)
    assert gate.reached.wait(60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "_changed", OpensTheGate(gate))
        if later == "save_async":
            fastckpt.save_async(state(2), second).wait(60)
        else:
            fastckpt.save(state(2), second, _use_new_zipfile_serialization=later == "save")
    assert gate.open.is_set(), "the later save did not wait"
    assert older.done()
    assert older.wait(60) > 0
    assert step_in(second) == step_in(first) == 2


class OpensTheGate(threading.Condition):
    """Lets the earlier save go on once the later one waits for it."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    def wait(self, timeout: float | None = None) -> bool:
        self._gate.open.set()
        return super().wait(timeout)


def test_the_target_of_a_relative_name_is_that_of_the_call(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    first = fastckpt.save_async(state(1), "x")
    assert gate.reached.wait(60)
    monkeypatch.chdir(tmp_path / "b")
    fastckpt.save(state(2), "x")  # another target: waits for nobody
    gate.open.set()
    first.wait(60)
    assert [step_in(tmp_path / name / "x") for name in "ab"] == [1, 2]


def test_saves_to_one_file_object_come_one_after_another(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.BytesIO):
        def write(self, data: Any) -> int:
            gate.wait()
            return super().write(data)

    target = Slow()
    handles = [fastckpt.save_async(state(1), target)]
    assert gate.reached.wait(60)
    monkeypatch.setattr(turns, "_changed", OpensTheGate(gate))
    handles += [fastckpt.save_async(state(step), target) for step in (2, 3)]
    for handle in handles:
        handle.wait(60)
    assert gate.open.is_set(), "nobody waited"
    target.seek(0)
    assert [step_in(target) for _ in range(3)] == [1, 2, 3]


def _later_than(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, first: Any, between: Callable[[], object], second: Any
) -> None:
    older = fastckpt.save_async(state(1), first)
    assert gate.reached.wait(60)
    between()
    monkeypatch.setattr(turns, "_changed", OpensTheGate(gate))
    fastckpt.save_async(state(2), second).wait(60)
    assert gate.open.is_set(), "the later save did not wait"
    older.wait(60)


def _removed(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder.parent / "takes its inode number").mkdir()
    folder.mkdir()


def _moved_away(folder: Path) -> None:
    folder.rename(folder.parent / "old")
    folder.mkdir()


@pytest.mark.parametrize("becomes", [_removed, _moved_away])
def test_a_directory_that_is_made_anew_keeps_the_order_of_its_targets(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, becomes: Callable[[Path], None]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    _later_than(gate, monkeypatch, folder / "x", lambda: becomes(folder), folder / "x")
    assert step_in(folder / "x") == 2


@linux
@pytest.mark.parametrize("names", ["raw", "descriptor", "another object", "temporary"])
def test_all_that_writes_to_one_open_file_is_one_target(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    with contextlib.ExitStack() as opened:
        first: Any = opened.enter_context(
            tempfile.NamedTemporaryFile("wb", dir=tmp_path) if names == "temporary" else open(tmp_path / "x", "ab")  # noqa: SIM115
        )
        others: dict[str, Callable[[], Any]] = {
            "raw": lambda: first.raw,
            "descriptor": lambda: f"/dev/fd/{first.fileno()}",
            "another object": lambda: opened.enter_context(open(tmp_path / "x", "ab")),
            "temporary": lambda: first.file,
        }
        second = others[names]()
        _later_than(gate, monkeypatch, first, lambda: None, second)
        with open(first.name, "rb") as written:
            assert [step_in(written) for _ in range(2)] == [1, 2]


def test_a_file_object_is_not_asked_for_a_descriptor_that_it_would_have_to_make() -> None:
    with tempfile.SpooledTemporaryFile() as spool:
        fastckpt.save(state(1), spool)
        assert not spool._rolled  # type: ignore[attr-defined]
        spool.seek(0)
        assert step_in(spool) == 1


def test_a_failed_save_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    older = fastckpt.save_async(state(1), tmp_path / "x")
    assert gate.reached.wait(60)
    newer = fastckpt.save_async(state(2), tmp_path / "x")
    monkeypatch.setattr(
        os, "fsync", lambda fd, real=os.fsync, failed=[]: failed.append(1) or _fail() if not failed else real(fd)
    )
    gate.open.set()
    with pytest.raises(OSError, match="made to fail"):
        older.wait(60)
    newer.wait(60)
    assert step_in(tmp_path / "x") == 2


def _fail() -> None:
    raise OSError(5, "made to fail")


def test_a_save_that_hangs_makes_the_later_ones_fail_by_name(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("x")
    hanging = fastckpt.save_async(state(1), tmp_path / "x")
    assert gate.reached.wait(60)
    third = fastckpt.save_async(state(2), tmp_path / "link", options=IMPATIENT)
    with pytest.raises(
        TargetBusyError, match=f"save_async to {tmp_path}/link was not made: save_async to {tmp_path}/x, begun"
    ) as told:
        third.wait(60)
    assert "max_order_wait_s" in str(told.value)
    monkeypatch.setenv("FASTCKPT_MAX_ORDER_WAIT_S", "0.05")
    with pytest.raises(TargetBusyError, match=r"after 0\.05 s"):
        fastckpt.save(state(3), tmp_path / "x")
    with pytest.raises(TargetBusyError):
        fastckpt.save(state(3), tmp_path / "x", _use_new_zipfile_serialization=False)
    gate.open.set()
    hanging.wait(60)
    assert step_in(tmp_path / "x") == 1
    assert sorted(os.listdir(tmp_path)) == ["link", "x"]


def test_load_does_not_wait_for_a_save(tmp_path: Path, gate: Gate) -> None:
    gate.first = False
    fastckpt.save(state(1), tmp_path / "x")
    gate.first = True
    handle = fastckpt.save_async(state(2), tmp_path / "x")
    assert gate.reached.wait(60)
    assert step_in(tmp_path / "x") == 1
    gate.open.set()
    handle.wait(60)
    assert step_in(tmp_path / "x") == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12: this process has threads
def test_a_forked_child_does_not_wait_for_its_parents_saves(tmp_path: Path, gate: Gate) -> None:
    handle = fastckpt.save_async(state(1), tmp_path / "x")
    assert gate.reached.wait(60)
    child = os.fork()
    if child == 0:
        try:
            fastckpt.save(state(2), tmp_path / "x")
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert step_in(tmp_path / "x") == 2
    gate.open.set()
    handle.wait(60)


def test_a_save_in_a_signal_handler_overtakes_the_one_that_it_interrupts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupted save cannot end before the handler does; written after it, it would replace the newer state."""
    path = tmp_path / "x"
    real, told = files.AtomicFile.write, list[Any]()

    def write(self: files.AtomicFile, data: Any) -> None:
        if not told:
            told.append(1)
            signal.raise_signal(signal.SIGUSR1)
        real(self, data)

    monkeypatch.setattr(files.AtomicFile, "write", write)
    before = signal.signal(signal.SIGUSR1, lambda *_: fastckpt.save(state(2), path))
    try:
        with pytest.raises(OvertakenError, match="was overtaken by save to"):
            fastckpt.save(state(1), path)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert step_in(path) == 2
    assert os.listdir(tmp_path) == ["x"]
    assert not turns._turns


def test_a_save_in_a_signal_handler_does_not_wait_for_one_that_is_just_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    real = files.AtomicFile.commit
    refused: list[pytest.ExceptionInfo[TargetBusyError]] = []

    def commit(self: files.AtomicFile) -> None:
        if not refused:
            with pytest.raises(TargetBusyError) as told:
                fastckpt.save(state(2), path)
            refused.append(told)
        real(self)

    monkeypatch.setattr(files.AtomicFile, "commit", commit)
    fastckpt.save(state(1), path)
    assert "interrupted" in str(refused[0].value)
    assert step_in(path) == 1


def test_a_turn_whose_save_was_cut_off_ends_with_it() -> None:
    key = "cut off"
    turns.take([key], "one")
    last = turns.take([key], "two")
    assert not last.wait(0.0)
    last.end()


def retrying(
    mode: Any, fail: Callable[[int, str, str], bool], *, refused: bool = False
) -> tuple[FaultyStore, Retrying]:
    def error(text: str) -> BaseException:
        found = StoreUnavailableError(text)
        found.refused = refused
        return found

    faulty = FaultyStore(MemoryStore(name=f"late-{time.monotonic_ns()}"), fail, mode, error=error)
    return faulty, Retrying(faulty, give_up_s=0.0, sleep=lambda seconds: None)


def put(store: Any, data: bytes) -> None:
    sink = object_sink.ObjectSink(store, "x")
    try:
        sink.write(data)
        sink.commit()
    finally:
        sink.abandon()


def test_a_save_over_a_put_of_unknown_fate_is_told_that_it_may_be_overwritten(caplog: pytest.LogCaptureFixture) -> None:
    faulty, store = retrying("delayed", lambda number, verb, key: number == 0)
    with pytest.raises(StoreUnavailableError):
        put(store, b"old")
    put(store, b"new")
    assert "without an answer" in caplog.text
    assert f"{store.url}/x is saved" in caplog.text
    faulty.release()
    assert store.get("x") == b"old"  # what the words are about


def test_an_unanswered_try_of_a_save_that_succeeded_counts_too(caplog: pytest.LogCaptureFixture) -> None:
    _, store = retrying("delayed", lambda number, verb, key: number == 0)
    store._give_up_s = 60
    put(store, b"old")
    assert "without an answer" not in caplog.text  # the late bytes would be the same
    put(store, b"new")
    assert "without an answer" in caplog.text


def test_nothing_is_told_after_a_put_that_was_refused(caplog: pytest.LogCaptureFixture) -> None:
    _, store = retrying("before", lambda number, verb, key: number == 0, refused=True)
    with pytest.raises(StoreUnavailableError):
        put(store, b"old")
    put(store, b"new")
    assert "without an answer" not in caplog.text


def test_late_writes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    late_writes.note("memory://forget", "x")
    assert late_writes.age_s("memory://forget", "x") == 0
    assert late_writes.age_s("memory://forget", "y") is None
    now += late_writes._FORGET_S + 1
    assert late_writes.age_s("memory://forget", "x") is None
    late_writes.note("memory://forget", "y")
    assert ("memory://forget", "x") not in late_writes._ended_s


@pytest.mark.parametrize("call", [fastckpt.save, fastckpt.save_async])
def test_an_interrupt_that_is_kept_holds_nobody_up(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notebooks and trainers keep the exception, and with it all that its frames hold."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OrderedSink, "expect", interrupt)
        with pytest.raises(KeyboardInterrupt) as kept:
            call(state(1), tmp_path / "x")
    fastckpt.save_async(state(2), tmp_path / "x", options=IMPATIENT).wait(60)
    assert step_in(tmp_path / "x") == 2
    assert kept.value is not None


def test_an_interrupt_while_the_thread_starts_does_not_break_its_save(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[threading.Thread] = []

    def start_and_interrupt(run: Callable[[], None], name: str) -> threading.Thread | None:
        thread = start_thread(run, name)
        assert thread is not None
        started.append(thread)
        assert gate.reached.wait(60)
        signal.raise_signal(signal.SIGINT)
        return thread

    monkeypatch.setattr(background, "start_thread", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        fastckpt.save_async(state(1), tmp_path / "x")
    assert started[0] in threads._unfinished, "the interpreter's end would not wait for it"
    gate.open.set()
    started[0].join(60)
    assert step_in(tmp_path / "x") == 1
