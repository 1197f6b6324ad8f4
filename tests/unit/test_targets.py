"""Where a save goes: the order of saves to one target, names that cannot be replaced, what a replaced file hands on, and URLs in paths."""

from __future__ import annotations

import io
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt import cli
from fastckpt.errors import OvertakenError, SaveError, StoreError, StoreUnavailableError, TargetBusyError
from fastckpt.host import files, held
from fastckpt.options import Options
from fastckpt.store import late_writes
from fastckpt.store.memory import MemoryStore
from fastckpt.store.open import open_store
from fastckpt.store.wrap import Retrying
from fastckpt.testing.faulty_store import FaultyStore
from fastckpt.writing import object_sink, sinks, turns
from fastckpt.writing.ordered_sink import key_of_path

IMPATIENT = Options(max_order_wait_s=0.05, threads=1)
linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


def step_in(f: Any) -> int:
    return int(fastckpt.load(f)["step"])


def state(step: int) -> dict[str, Any]:
    return {"step": step, "w": torch.full((100,), float(step))}


class Gate:
    """Holds up the first save that reaches a sink's commit until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.first = True

    def wait(self) -> None:
        first, self.first = self.first, False
        if first:
            self.reached.set()
            assert self.open.wait(60)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The first save to a path, object or file object stops just before its last step."""
    gate = Gate()
    for owner in (files.AtomicFile, sinks.DirectFile, sinks.FileObject, object_sink.ObjectSink):

        def commit(self: Any, real: Callable[[Any], None] = owner.commit) -> None:  # type: ignore[attr-defined]
            gate.wait()
            real(self)

        monkeypatch.setattr(owner, "commit", commit)
    yield gate
    gate.open.set()
    assert not turns._turns, "a save has ended and left its turn"


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
    real, told = files.AtomicFile.write, []

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
    turns.take(key, "one")
    last = turns.take(key, "two")
    assert not last.wait(0.0)
    last.end()


# -- objects of a store --------------------------------------------------------------------------------------------------


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


# -- what cannot be replaced ---------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("name", ["/proc/self/fd/{}", "/dev/fd/{}", "/proc/thread-self/fd/{}", "link"])
@pytest.mark.parametrize("kind", ["memfd", "file", "unlinked"])
def test_the_name_of_a_descriptor_is_the_file_behind_it(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "memfd":
        fd = os.memfd_create("x")
    else:
        fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
        if kind == "unlinked":
            os.unlink(tmp_path / "x")
    try:
        path = name.format(fd)
        if name == "link":
            path = str(tmp_path / "link")
            os.symlink(f"/proc/self/fd/{fd}", path)
        fastckpt.save(state(1), path)
        size = os.fstat(fd).st_size
        os.lseek(fd, 0, os.SEEK_SET)
        os.ftruncate(fd, 0)
        fastckpt.save_async(state(2), path).wait(60)
        assert os.fstat(fd).st_size == size
        assert step_in(path) == 2
        with open(fd, "rb", closefd=False) as f:
            f.seek(0)
            assert step_in(f) == 2
    finally:
        os.close(fd)
    assert not [left for left in os.listdir("/") if "deleted" in left]


@linux
def test_a_descriptor_is_written_at_its_position_and_nothing_is_cut_off(tmp_path: Path) -> None:
    """What a shell's `> file` makes of /dev/stdout."""
    out = tmp_path / "out"
    script = "import fastckpt; print('before', flush=True); fastckpt.save({'step': 7}, '/dev/stdout')"
    with out.open("wb") as f:
        subprocess.run([sys.executable, "-c", script], stdout=f, check=True, timeout=120)
        inode = os.fstat(f.fileno()).st_ino
    assert out.stat().st_ino == inode
    assert out.read_bytes().startswith(b"before\n")
    with out.open("rb") as f:
        assert f.read(7) == b"before\n"
        assert step_in(f) == 7


@linux
def test_descriptors_that_cannot_be_written(tmp_path: Path) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="reading only"):
            fastckpt.save(state(1), f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    with pytest.raises(FileNotFoundError):
        fastckpt.save(state(1), f"/proc/self/fd/{fd}")


@linux
def test_a_descriptor_of_another_process_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"held")
    with (tmp_path / "x").open("rb+") as f:
        other = subprocess.Popen(["sleep", "60"], stdin=f, stdout=subprocess.PIPE)
        try:
            with pytest.raises(OSError, match=f"open in process {other.pid}"):
                fastckpt.save(state(1), f"/proc/{other.pid}/fd/0")
        finally:
            other.kill()
            other.communicate()
    assert (tmp_path / "x").read_bytes() == b"held"


@linux
def test_a_pipe_behind_a_descriptor() -> None:
    ours, theirs = os.pipe()
    received: list[bytes] = []
    with open(ours, "rb") as f:
        reader = threading.Thread(target=lambda: received.append(f.read()))
        reader.start()
        fastckpt.save(state(3), f"/dev/fd/{theirs}")
        os.close(theirs)
        reader.join()
    assert step_in(io.BytesIO(received[0])) == 3


def test_a_pipe_without_reader_does_not_keep_save_async(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    handle = fastckpt.save_async(state(4), tmp_path / "pipe")
    assert not handle.done()
    data = (tmp_path / "pipe").read_bytes()
    handle.wait(60)
    assert step_in(io.BytesIO(data)) == 4


@linux
@pytest.mark.parametrize("legacy", [False, True])
def test_an_empty_file_that_is_open_is_written_where_it_lies(tmp_path: Path, legacy: bool) -> None:
    with tempfile.NamedTemporaryFile(dir=tmp_path) as f:
        fastckpt.save(state(1), f.name, _use_new_zipfile_serialization=not legacy)
        f.seek(0)
        assert step_in(f) == 1
    assert os.listdir(tmp_path) == []


@linux
def test_an_empty_file_that_another_process_has_open(tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=tmp_path) as f:
        script = "import fastckpt, sys; fastckpt.save({'step': 9}, sys.argv[1])"
        subprocess.run([sys.executable, "-c", script, f.name], check=True, timeout=120)
        assert step_in(f) == 9


@linux
def test_where_there_are_no_leases_only_this_process_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(fd: int, *arguments: Any) -> int:
        if arguments[0] == held.fcntl.F_SETLEASE:
            raise OSError(22, "Invalid argument")
        return int(fcntl_fcntl(fd, *arguments))

    fcntl_fcntl = held.fcntl.fcntl
    (tmp_path / "x").touch()
    with monkeypatch.context() as patch:
        patch.setattr(held.fcntl, "fcntl", refused)
        assert not held.held_open(str(tmp_path / "x"))
        with (tmp_path / "x").open("rb"):
            assert held.held_open(str(tmp_path / "x"))


def test_an_empty_file_that_nobody_holds_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    inode = path.stat().st_ino
    keep = tmp_path / "keep"
    os.link(path, keep)  # or the number could be given out again
    fastckpt.save(state(1), path)
    assert path.stat().st_ino != inode


@linux
def test_a_failed_save_leaves_an_open_empty_file_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        raise OSError(5, "made to fail")

    with tempfile.NamedTemporaryFile(dir=tmp_path) as f:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(OSError, match="made to fail"):
                fastckpt.save(state(1), f.name)
        assert os.path.getsize(f.name) == 0
        fastckpt.save(state(2), f.name)
        assert step_in(f) == 2


@linux
def test_a_file_with_bytes_that_is_open_is_replaced_and_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.NamedTemporaryFile(dir=tmp_path) as f:
        nobody = turns.take(key_of_path(f.name), "a save that has not begun")
        first, second = fastckpt.save_async(state(1), f.name), fastckpt.save_async(state(2), f.name)
        assert not caplog.records  # both are about to write into an empty file
        nobody.end()
        first.wait(60)
        second.wait(60)
        assert step_in(f) == 1
        assert step_in(f.name) == 2
        assert f"{f.name} is open for writing in this process (descriptor {f.fileno()})" in caplog.text


def test_a_file_with_bytes_that_is_open_for_reading_is_replaced_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fastckpt.save(state(1), tmp_path / "x")
    with fastckpt.open(tmp_path / "x") as reader:
        fastckpt.save(state(2), tmp_path / "x")
        assert reader["w"][0] == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a user without rights, if this is root. sys.argv[1:] are the words."""
    script = (
        "import os, sys, fastckpt, torch\n"
        "torch.save({}, os.devnull)\n"  # imports what torch imports late, while it may be read
        "fastckpt.save({}, os.devnull)\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script + words[0], *words[1:]], check=False, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach: pytest's own are closed."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
        os.chmod(name, 0o755)


@pytest.mark.parametrize("mode", [0o555, pytest.param(0o1777, marks=root)], ids=oct)
def test_a_directory_that_is_closed(public: Path, mode: int) -> None:
    """An empty file in it is written in place; one that holds bytes is left alone, and the error says what would do.

    7 s: only a process of its own can give its rights away, and this starts three.
    """
    path = public / "x"
    path.touch()
    path.chmod(0o666)
    public.chmod(mode)
    save = "fastckpt.save({'step': int(sys.argv[2])}, sys.argv[1])"
    done = as_nobody(save, str(path), "1")
    assert done.returncode == 0, done.stderr
    assert step_in(path) == 1
    again = as_nobody(save, str(path), "2")
    assert again.returncode == 1
    assert "PermissionError" in again.stderr
    assert "open(path, 'wb')" in again.stderr
    assert ("sticky" if mode & stat.S_ISVTX else "may not be written") in again.stderr
    assert step_in(path) == 1
    given = as_nobody("with open(sys.argv[1], 'wb') as f: fastckpt.save({'step': 3}, f)", str(path))
    assert given.returncode == 0, given.stderr
    assert step_in(path) == 3


def test_a_mounted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    fastckpt.save(state(1), path)
    monkeypatch.setattr(held, "_mount_points", lambda: {str(path)})
    with pytest.raises(OSError, match="it is a mount point"):
        fastckpt.save(state(2), path)
    assert step_in(path) == 1
    path.write_bytes(b"")
    inode = path.stat().st_ino
    fastckpt.save(state(3), path)
    assert (path.stat().st_ino, step_in(path)) == (inode, 3)


@linux
def test_mount_points_are_read() -> None:
    assert "/" in held._mount_points()


def test_a_hard_link_keeps_the_old_file(tmp_path: Path) -> None:
    fastckpt.save(state(1), tmp_path / "x")
    os.link(tmp_path / "x", tmp_path / "best")
    fastckpt.save(state(2), tmp_path / "x")
    assert (step_in(tmp_path / "x"), step_in(tmp_path / "best")) == (2, 1)


# -- what the new file takes over ----------------------------------------------------------------------------------------


@root
def test_owner_group_and_permissions_stay(tmp_path: Path) -> None:
    path = tmp_path / "x"
    fastckpt.save(state(1), path)
    os.chown(path, 1234, 2345)
    path.chmod(0o4640)
    fastckpt.save(state(2), path)
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 2345, 0o4640)


@root
def test_rights_of_another_owner_are_not_taken_over(public: Path) -> None:
    """Who may not give the file back to its owner gets no program that runs with somebody's rights."""
    path = public / "x"
    fastckpt.save(state(1), path)
    os.chown(path, 1234, 65534)
    path.chmod(0o6666)
    public.chmod(0o777)
    done = as_nobody("fastckpt.save({'step': 2}, sys.argv[1])", str(path))
    assert done.returncode == 0, done.stderr
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (65534, 65534, 0o666)


def test_attributes_stay(tmp_path: Path) -> None:
    path = tmp_path / "x"
    fastckpt.save(state(1), path)
    try:
        os.setxattr(path, "user.note", b"of mine")
    except OSError:
        pytest.skip("this file system has no attributes of users")
    fastckpt.save_async(state(2), path).wait(60)
    assert os.getxattr(path, "user.note") == b"of mine"


def acl(user: int, mask: int) -> bytes:
    """An access list as the kernel keeps it: owner rw, one more user rw, group and others nothing."""
    entries = [(1, 6, 0xFFFFFFFF), (2, 6, user), (4, 0, 0xFFFFFFFF), (0x10, mask, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)]
    words = b"".join(
        tag.to_bytes(2, "little") + rights.to_bytes(2, "little") + who.to_bytes(4, "little")
        for tag, rights, who in entries
    )
    return (2).to_bytes(4, "little") + words


def set_acl(path: Path, kind: str) -> None:
    try:
        os.setxattr(path, f"system.posix_acl_{kind}", acl(1234, 6))
    except OSError:
        pytest.skip("this file system has no access lists")


def test_an_access_list_stays(tmp_path: Path) -> None:
    path = tmp_path / "x"
    fastckpt.save(state(1), path)
    set_acl(path, "access")
    before = os.getxattr(path, "system.posix_acl_access")
    fastckpt.save(state(2), path)
    assert os.getxattr(path, "system.posix_acl_access") == before


def test_a_directorys_default_list_does_not_open_a_file_that_was_closed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    fastckpt.save(state(1), path)
    path.chmod(0o660)
    set_acl(tmp_path, "default")
    fastckpt.save(state(2), path)
    assert "system.posix_acl_access" not in os.listxattr(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_what_was_changed_while_a_save_was_under_way_counts(tmp_path: Path, gate: Gate) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    handle = fastckpt.save_async(state(1), path)
    assert gate.reached.wait(60)
    path.chmod(0o600)
    gate.open.set()
    handle.wait(60)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# -- URLs in paths -------------------------------------------------------------------------------------------------------


class Url:
    def __init__(self, text: str) -> None:
        self._text = text

    def __fspath__(self) -> str:
        return self._text


@pytest.mark.parametrize("make", [str, Path, Url], ids=["str", "Path", "PathLike"])
def test_a_path_object_of_a_url_is_the_url(
    make: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    target = make("memory://paths/x")
    fastckpt.save(state(1), target)
    fastckpt.save_async(state(2), target).wait(60)
    assert step_in(target) == step_in("memory://paths/x") == 2
    assert fastckpt.get_unsafe_globals(target) == []
    with fastckpt.open(target) as reader:
        assert reader["w"][0] == 2
    with fastckpt.Checkpointer(
        make(f"memory://paths-{make.__name__}"), {"m": torch.nn.Linear(2, 2)}, spot=None, every=None
    ) as ckpt:
        ckpt.save_now(1).wait()
    assert any(open_store(f"memory://paths-{make.__name__}").list("commits/"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("use", [fastckpt.save, fastckpt.save_async])
@pytest.mark.parametrize("url", ["gs://bucket/x", "az://bucket/x", "s3://bad bucket/x", "s3://", "http://host/x"])
def test_a_path_object_of_a_url_that_cannot_be_one_makes_no_directory(
    url: str, use: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for target in (Path(url), url):
        with pytest.raises((SaveError, StoreError), match=url.partition(":")[0]):
            use(state(1), target)
        with pytest.raises((SaveError, StoreError)):
            fastckpt.load(target)
        with pytest.raises(StoreError):
            fastckpt.Checkpointer(target, {"m": torch.nn.Linear(2, 2)}, spot=None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("scheme", ["s3", "gs", "memory", "file"])
def test_a_url_that_was_made_absolute_is_refused(scheme: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    target = Path(f"{scheme}://bucket/run").absolute()
    for use in (lambda: fastckpt.save(state(1), target), lambda: fastckpt.load(target), lambda: open_store(target)):
        with pytest.raises(StoreError, match=f"Give '{scheme}://bucket/run' as a string"):
            use()
    assert os.listdir(tmp_path) == []
    (tmp_path / f"{scheme}:").mkdir()  # whoever has one gets at it
    (tmp_path / f"{scheme}:" / "bucket").mkdir()
    fastckpt.save(state(1), target)
    assert step_in(target) == step_in(f"./{scheme}:/bucket/run") == 1


@pytest.mark.parametrize(
    "form", ["file://{}", "file://localhost{}", "file://LOCALHOST{}", "file:{}", "file:///{}"], ids=str
)
def test_file_urls(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    for text in (f"{folder}/a b.ckpt", f"{folder}/a%20b.ckpt".replace(" ", "%20")):
        fastckpt.save(state(5), form.format(text))
        assert step_in(form.format(text)) == step_in(folder / "a b.ckpt") == 5
    fastckpt.save(state(6), Url(form.format(f"{folder}/new/x")))  # makes the directory, as a store does
    assert sorted(os.listdir(folder)) == ["a b.ckpt", "new"]
    with pytest.raises((SaveError, StoreError)):
        fastckpt.save(state(5), form.format(f"{folder}/"))


@pytest.mark.parametrize("url", ["file://host/x", "file://", "file:", "file:///a%00b"])
def test_file_urls_that_are_none(url: str) -> None:
    for use in (lambda: fastckpt.save({}, url), lambda: fastckpt.load(url), lambda: open_store(url)):
        with pytest.raises(StoreError, match="no file URL"):
            use()


@pytest.mark.parametrize("url", ["memory://foreign/x", "file://{}/x"])
def test_torchs_own_files_are_loaded_from_urls(tmp_path: Path, url: str) -> None:
    data = io.BytesIO()
    torch.save(state(8), data)
    url = url.format(tmp_path)
    with open_store(url.rpartition("/")[0]) as store:
        store.put("x", data.getvalue())
    assert step_in(url) == 8
    assert fastckpt.get_unsafe_globals(url) == []


def test_the_command_line_understands_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fastckpt.Checkpointer(tmp_path / "a run", {"m": torch.nn.Linear(2, 2)}, spot=None, every=None) as ckpt:
        ckpt.save_now(1).wait()
    for text in (f"file:{tmp_path}/a run", f"file://localhost{tmp_path}/a%20run"):
        assert cli.main(["ls", text]) == cli.OK
        out = str(tmp_path / "out")
        assert cli.main(["restore", text, "--out", f"file:{out}", "--force"]) == cli.OK
        assert "m" in fastckpt.load(out)
    assert cli.main(["restore", text, "--out", "s3:/bucket/x"]) == cli.USAGE
    assert "--out is 's3:/bucket/x'" in capsys.readouterr().err
    assert cli.main(["ls", "gs:/bucket/x"]) == cli.USAGE


@pytest.mark.parametrize("below", ["", "/run", "/run/7"])
def test_a_file_in_the_place_of_a_directory_is_named(tmp_path: Path, below: str) -> None:
    path = tmp_path / "x"
    path.touch()
    for url in (f"{path}{below}", f"file://{path}{below}"):
        with pytest.raises(StoreError, match=f"{path} is a file"):
            fastckpt.Checkpointer(url, {"m": torch.nn.Linear(2, 2)}, spot=None)
    assert path.read_bytes() == b""
