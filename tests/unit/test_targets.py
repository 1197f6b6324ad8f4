"""Where a save goes: names that cannot be replaced, and what a replaced file hands on."""

from __future__ import annotations

import io
import logging
import os
import stat
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

import fastckpt
from fastckpt.host import held
from fastckpt.writing import turns
from fastckpt.writing.ordered_sink import keys_of_path
from tests.support.targets import Gate, linux, root, state, step_in

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
def test_where_there_are_no_leases_only_this_process_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(fd: int, *arguments: Any) -> int:
        if arguments[0] == held.fcntl.F_SETLEASE:  # type: ignore[attr-defined]
            raise OSError(22, "Invalid argument")
        return int(fcntl_fcntl(fd, *arguments))

    fcntl_fcntl = held.fcntl.fcntl  # type: ignore[attr-defined]
    (tmp_path / "x").touch()
    with monkeypatch.context() as patch:
        patch.setattr(held.fcntl, "fcntl", refused)  # type: ignore[attr-defined]
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
        nobody = turns.take(keys_of_path(f.name), "a save that has not begun")
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


def test_a_mounted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    fastckpt.save(state(1), path)
    monkeypatch.setattr(held, "mount_points", lambda: {str(path)})
    with pytest.raises(OSError, match="it is a mount point"):
        fastckpt.save(state(2), path)
    assert step_in(path) == 1
    path.write_bytes(b"")
    inode = path.stat().st_ino
    fastckpt.save(state(3), path)
    assert (path.stat().st_ino, step_in(path)) == (inode, 3)


@linux
def test_mount_points_are_read() -> None:
    assert "/" in held.mount_points()


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
