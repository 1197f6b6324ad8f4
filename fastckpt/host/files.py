"""Files: the only module that creates, syncs, renames and removes them.

A new file becomes visible in one step and only when it is whole and on stable storage:

    create unnamed (O_TMPFILE) → write → fsync → link to a temporary name → rename over the target → fsync the directory

An unnamed file vanishes with the process, so a killed save leaves nothing behind. Where the file system has no O_TMPFILE, a temporary
name next to the target is used from the start, and a kill leaves that file.

What cannot be replaced is written where it lies (docs/guarantees.md, §6): devices and pipes, descriptors under their names, and a file
without bytes that somebody holds open or whose directory is closed to us. A file that holds bytes never is.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastckpt.errors import SaveError
from fastckpt.host.attributes import take_over
from fastckpt.host.held import descriptor_of, held_for_writing, held_open, is_own, why_not_replaced
from fastckpt.host.pages import fresh_pages
from fastckpt.host.threads import WorkerPool

logger = logging.getLogger("fastckpt")

_OBJECT_WRITE_BYTES = 4 << 20  # what is copied for one call of a caller's `write`
_DIRECT_BYTES = 4 << 20
_BLOCK_BYTES = 4096
_WRITE_BYTES = 16 << 20  # Linux writes at most 2 GiB - 4 KiB in one call; a smaller step also lets signals through


class Sink(Protocol):
    """Where a container goes: written front to back, then finished or abandoned. Used by one thread."""

    def write(self, data: Any) -> None:
        """Append a buffer. On return the caller may reuse it."""

    def commit(self) -> None:
        """Make what was written durable and visible (paths) or flush it (file objects)."""

    def abandon(self) -> None:
        """Forget what was written: the target stays as it was. Never raises."""


def _write_all(fd: int, data: Any) -> None:
    view = memoryview(data).cast("B")
    while view.nbytes:
        view = view[os.write(fd, view[:_WRITE_BYTES]) :]


class _DirectWriter:
    """Writes a file front to back past the page cache, where the file system can.

    What is synced at once anyway gains nothing there: through the cache, 420 MB cost 110 ms of a processor that training wants, past it 15,
    and the disk works from the first megabytes on, not from the fsync on (ext4 on a virtual disk, 2 cores). Direct writes want whole blocks
    from aligned memory; what comes in other pieces is joined in one of two buffers while a thread writes the other. Files that do not fill
    one go the ordinary way.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._direct: bool | None = None
        """None: not tried yet."""
        self._rooms: list[npt.NDArray[np.uint8]] = []
        self._filled = 0
        self._writer: WorkerPool | None = None
        self._pending: Future[None] | None = None

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view.nbytes:
            if self._direct is False and not self._filled:
                self._settle()
                _write_all(self._fd, view)
                return
            if not self._filled and view.nbytes >= _DIRECT_BYTES and _address(view) % _BLOCK_BYTES == 0:
                whole = view.nbytes // _BLOCK_BYTES * _BLOCK_BYTES
                self._settle()
                self._write_blocks(view[:whole])
                view = view[whole:]
                continue
            if not self._rooms:
                self._rooms = [fresh_pages(_DIRECT_BYTES) for _ in range(2)]
            n = min(_DIRECT_BYTES - self._filled, view.nbytes)
            # np.copyto lets go of the GIL, without which the other thread would not even begin.
            np.copyto(self._rooms[0][self._filled : self._filled + n], np.frombuffer(view[:n], np.uint8))
            self._filled, view = self._filled + n, view[n:]
            if self._filled == _DIRECT_BYTES:
                self._hand_over()

    def _hand_over(self) -> None:
        self._settle()
        if self._writer is None:
            self._writer = WorkerPool(1, "fastckpt-write")
        self._pending = self._writer.submit(functools.partial(self._write_blocks, self._rooms[0].data))
        self._rooms.reverse()
        self._filled = 0

    def _settle(self) -> None:
        """Wait for the buffer under way; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def flush(self) -> None:
        """Write what is left; nothing is written after this."""
        self._settle()
        if self._filled:
            if self._direct:
                self._set_direct(False)
            _write_all(self._fd, self._rooms[0][: self._filled])
        self.close()

    def close(self) -> None:
        """Nobody writes any more. May be called twice."""
        if self._writer is not None:
            self._writer.close()
        self._rooms, self._filled, self._pending = [], 0, None

    def _write_blocks(self, view: memoryview) -> None:
        if self._direct is None:
            self._set_direct(True)
        while view.nbytes:
            try:
                n = os.write(self._fd, view[:_WRITE_BYTES])
            except OSError as error:
                # Larger blocks than ours, or a short write has left the file in the middle of one.
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._set_direct(False)
                continue
            view = view[n:]

    def _set_direct(self, wanted: bool) -> None:
        flag = getattr(os, "O_DIRECT", 0)  # macOS has none
        if flag:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            try:
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | flag if wanted else flags & ~flag)
            except OSError:  # a file system in memory, FUSE
                wanted = False
        self._direct = wanted and bool(flag)


def _address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


def sync_directory(path: str) -> None:
    """fsync a directory: until then a rename in it may be lost with the power."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_IMPLEMENTED:
            raise
        _warn_of_directories(path, error)
    finally:
        os.close(fd)


_NOT_IMPLEMENTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY)
_warned_of_directories = False


def _warn_of_directories(path: str, error: OSError) -> None:
    """Once a process: SMB and some FUSE file systems cannot sync a directory."""
    global _warned_of_directories  # noqa: PLW0603 - told twice at worst
    if not _warned_of_directories:
        _warned_of_directories = True
        logger.warning(
            "the file system of %s cannot sync directories (%s): what is saved there survives a killed process, but perhaps no power loss",
            path,
            error.strerror,
        )


def _rename_if_absent(source: str, target: str) -> None:
    """renameat2(2) with RENAME_NOREPLACE: FileExistsError if there is something at `target`. OSError where the system or the file system
    has no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), target)
    if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_NO_LINKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK)  # FUSE, exFAT, Android's sdcardfs


class NoAtomicCreateError(OSError):
    """The file system has no operation that creates a name only if it is free."""


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Puts the path into errors of calls that know a descriptor only: "No space left on device" alone does not say which one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = path
        raise


class AtomicFile:
    """A Sink that replaces the file at `path` whole or not at all.

    A symbolic link is followed and stays; a hard link is not: other names keep the old file. The new file takes over the old one's owner,
    group, permissions and attributes where this process may set them; one without an old file has the permissions that the umask leaves.
    """

    def __init__(self, path: str, *, exclusive: bool = False) -> None:
        """exclusive: `commit` raises FileExistsError if there is something at the path, and leaves it alone."""
        self._exclusive = exclusive
        self._path = path
        self._target = os.path.realpath(path)
        self._directory, name = os.path.split(self._target)
        for parent in (os.path.dirname(path), self._directory):  # as it was given first: torch.save's words
            if parent and not os.path.isdir(parent):
                raise SaveError(f"Parent directory {parent} does not exist.")
        if os.path.isdir(self._target):
            raise SaveError(f"File {self._target} cannot be opened: it is a directory")
        short = os.fsencode(name)[:150].decode("utf-8", "ignore")  # a file name has at most 255 bytes
        self._temporary = os.path.join(self._directory, f".{short}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        self._name: str | None = None
        """The temporary name, from just before the file may have it until the rename."""
        self._fd = -1
        self._writer: _DirectWriter | None = None
        try:
            self._fd = self._create()
            if not exclusive:
                take_over(self._fd, self._target)  # before there are bytes that others must not read
            self._writer = _DirectWriter(self._fd)
        except BaseException:
            self.abandon()
            raise

    def _create(self) -> int:
        if hasattr(os, "O_TMPFILE"):
            try:
                fd = os.open(self._directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
                if os.path.exists(f"/proc/self/fd/{fd}"):
                    return fd
                os.close(fd)  # no /proc in this sandbox: an unnamed file could never be given a name
            except OSError as error:
                # Not every file system has unnamed files (NFS, FUSE, old overlayfs); kernels before 3.11 answer EISDIR.
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                    raise
        self._name = self._temporary
        try:
            return os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            self._name = None  # 32 random bits met somebody else's file: not ours to remove
            raise

    def write(self, data: Any) -> None:
        assert self._writer is not None
        with _naming(self._path):
            self._writer.write(data)

    def commit(self) -> None:
        with _naming(self._path):
            self._commit()

    def _commit(self) -> None:
        assert self._writer is not None
        self._writer.flush()
        if not self._exclusive:
            take_over(self._fd, self._target)  # again: an earlier save, or somebody else, may have changed it meanwhile
        os.fsync(self._fd)
        if self._exclusive:
            self._link_exclusively()
            return
        try:
            self._give_name(self._temporary)
            os.rename(self._name or self._temporary, self._target)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            raise OSError(
                error.errno,
                f"{error.strerror}: this file system cannot rename files (a mounted bucket?), so none can be replaced whole. Use "
                "s3://bucket/… itself, or another directory",
                self._target,
            ) from error
        self._name = None
        self._close()
        sync_directory(self._directory)

    def _give_name(self, name: str) -> None:
        """Where the file has none yet."""
        if self._name is not None:
            return
        self._name = name
        try:
            # src_dir_fd plays no part with an absolute path, but makes CPython call linkat, which alone follows the link.
            os.link(f"/proc/self/fd/{self._fd}", name, src_dir_fd=self._fd, follow_symlinks=True)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._copy_to(name)

    def _copy_to(self, name: str) -> None:
        """A file system with unnamed files and without links: the bytes go to a named one."""
        named = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(named, stat.S_IMODE(os.fstat(self._fd).st_mode))
            source = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                while data := os.read(source, _WRITE_BYTES):
                    _write_all(named, data)
            finally:
                os.close(source)
            if not self._exclusive:
                take_over(named, self._target)
            os.fsync(named)
        finally:
            os.close(named)

    def _link_exclusively(self) -> None:
        """link(2) creates a name only if it is free; where a file system has no links, renameat2(2) may."""
        try:
            if self._name is None:
                os.link(f"/proc/self/fd/{self._fd}", self._target, src_dir_fd=self._fd, follow_symlinks=True)
            else:
                os.link(self._name, self._target)
                os.unlink(self._name)
                self._name = None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._rename_exclusively(error)
        self._close()
        sync_directory(self._directory)

    def _rename_exclusively(self, no_link: OSError) -> None:
        try:
            self._give_name(self._temporary)
            _rename_if_absent(self._temporary, self._target)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in (*_NO_LINKS, errno.EINVAL):
                raise
            raise NoAtomicCreateError(
                error.errno,
                f"this file system has neither hard links (link: {no_link.strerror}) nor a rename that replaces nothing (renameat2: "
                f"{error.strerror}), so two processes could overwrite each other's files. Is it a bucket that is mounted? Give its URL "
                "(s3://bucket/…) instead, or a directory of a local disk or of NFS",
                self._target,
            ) from error
        self._name = None

    def _close(self) -> None:
        # Forgotten first: Linux has closed a descriptor even when close reports an error, and closing it
        # again could close another thread's file.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def abandon(self) -> None:
        name, self._name = self._name, None
        if self._writer is not None:
            self._writer.close()
        try:
            self._close()
        except OSError as error:
            logger.warning("closing the unfinished file for %s failed: %s", self._target, error)
        if name is not None:
            try:
                Path(name).unlink(missing_ok=True)
            except OSError as error:
                logger.warning("the temporary file %s could not be removed: %s", name, error)


class DirectFile:
    """A Sink for what lies at a path and cannot be replaced: a device, a pipe, a descriptor, a file without bytes.

    Not atomic: who looks meanwhile sees a part. A file that was empty is emptied again if the save fails.
    """

    def __init__(self, path: str, fd: int | None = None, *, empty: bool = False) -> None:
        """fd: closed in the end; None: the path is opened at the first write, as opening a pipe waits for its reader. empty: it is a file
        without bytes."""
        self._path, self._fd, self.empty = path, fd, empty
        self.absolute_path = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
        self._written = False

    def write(self, data: Any) -> None:
        with _naming(self._path):
            if self._fd is None:
                self._fd = _open_to_write(self.absolute_path)
            if self.empty and not self._written and os.fstat(self._fd).st_size:
                raise SaveError(
                    f"{self._path} was empty when the save began and holds bytes now: a file that holds bytes is not written in place. "
                    "Save again"
                )
            self._written = True
            _write_all(self._fd, data)

    def commit(self) -> None:
        assert self._fd is not None
        with _naming(self._path):
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                os.fsync(self._fd)
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def abandon(self) -> None:
        try:
            if self.empty and self._written and self._fd is not None:
                os.ftruncate(self._fd, 0)
            self._close()
        except OSError as error:
            logger.warning("closing the unfinished output %s failed: %s", self._path, error)


class FileObject:
    """A Sink for a caller's writable object: needs `write` and `flush`, no seek. It stays open; durability is its owner's."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view.nbytes:
            # bytes, not a view: writers may keep what they are given, and our buffers are used again.
            piece = bytes(view[:_OBJECT_WRITE_BYTES])
            written = self._target.write(piece)
            if written is None:  # torch accepts writers that return nothing; they have taken it all
                written = len(piece)
            if type(written) is not int or not 0 < written <= len(piece):
                raise SaveError(
                    f"{type(self._target).__name__}.write returned {written!r} for {len(piece)} bytes: expected None or "
                    "the number of bytes that it took"
                )
            view = view[written:]

    def commit(self) -> None:
        self._target.flush()

    def abandon(self) -> None:
        """What was written stays in the object: it cannot be taken back."""


def open_sink(path: str) -> Sink:
    """The sink for a path of this machine. OSError, SaveError."""
    descriptor = descriptor_of(path)
    if descriptor is not None and is_own(descriptor[0]):
        return _of_descriptor(path, descriptor[1])
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return AtomicFile(path)
    if stat.S_ISDIR(found.st_mode):
        return AtomicFile(path)  # says so
    if not stat.S_ISREG(found.st_mode):
        return DirectFile(path, None if stat.S_ISFIFO(found.st_mode) else _open_to_write(path))
    if descriptor is not None:
        why: tuple[int, str] | None = (errno.EBUSY, f"it is open in process {descriptor[0]} and is named as that")
    else:
        why = why_not_replaced(os.path.realpath(path), found)
    if not found.st_size and (why or held_open(path)):
        return DirectFile(path, _open_to_write(path), empty=True)
    if why:
        number, words = why
        raise OSError(
            number,
            f"{os.strerror(number)}: {words}. It holds {found.st_size} bytes, and these are not overwritten in place, where a save that "
            "fails would destroy them. Save to another directory; or give the file itself, which is not atomic then: open(path, 'wb')",
            path,
        )
    writing = held_for_writing(found)
    if writing is not None:
        logger.warning(
            "%s is open for writing in this process (descriptor %d), and the save puts a new file in its place: what is open there stays "
            "the old one. Open it again, or save to the file object",
            path,
            writing,
        )
    return AtomicFile(path)


def _of_descriptor(path: str, number: int) -> Sink:
    """Through a copy of the descriptor: at its position, whatever becomes of the original meanwhile."""
    try:
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, f"descriptor {number} is open for reading only", path)
        fd = os.dup(number)
    except OSError as error:
        if error.filename is None:
            raise FileNotFoundError(errno.ENOENT, f"there is no descriptor {number}", path) from error
        raise
    return DirectFile(path, fd)


def _open_to_write(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def make_directories(path: str) -> None:
    """mkdir -p, each new entry synced into its parent: without that a power cut could take the directory and all that is in it."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        try:
            os.mkdir(directory)
        except FileExistsError:
            if not os.path.isdir(directory):
                raise
        sync_directory(os.path.dirname(directory))


def remove_file(path: str) -> None:
    """Unlink, durably: what is removed afterwards is not found without this one gone too. FileNotFoundError."""
    os.unlink(path)
    sync_directory(os.path.dirname(path))


def remove_empty_directories(path: str, root: str) -> None:
    """Remove a directory and its parents below the root as long as they are empty; others' files in them are no error."""
    while path != root and path.startswith(root):
        try:
            os.rmdir(path)
        except OSError:
            return
        path = os.path.dirname(path)
