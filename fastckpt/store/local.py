"""A directory as a store: every object is a file, whole or absent, and on stable storage when a write returns."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from typing import Any

from fastckpt.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    SaveError,
    StoreAccessError,
    StoreError,
    StoreFullError,
)
from fastckpt.host.files import AtomicFile, NoAtomicCreateError, make_directories, remove_empty_directories, remove_file
from fastckpt.host.sink import committing
from fastckpt.store.base import ObjectInfo, Store, check_key, check_prefix
from fastckpt.store.location import is_url, location

_PUT_TRIES = (
    100  # tries of a put into a directory that a concurrent delete keeps removing; each failure needs another delete
)
_MAX_READ_BYTES = 1 << 30
_STALE_S = 24 * 3600.0  # an active writer writes more often than this, even if a file server's clock is wrong


_Infos = list[ObjectInfo]  # inside of the class, `list` means the method


class LocalStore(Store):
    """Keys are paths under `root`, which is created with the first object.

    A put is a new file, fsynced, renamed into place (or linked, for `put_if_absent`), and an fsync of its directory. Unfinished files are
    named ".….tmp" and never listed; on file systems with unnamed files (O_TMPFILE) a killed writer leaves none. Symbolic links below the
    root are not followed. Network file systems: `put_if_absent` is as atomic as their link(2).
    """

    useful_connections = (
        2  # one request writes while the other syncs; eight took no less time and four times the memory
    )

    has_files = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        path = location(root)
        if is_url(path):
            raise StoreError(f"{path!r} is no directory: open_store opens URLs")
        self._root = os.path.realpath(path)
        found = self._root
        while not os.path.lexists(found):
            found = os.path.dirname(found)
        if not os.path.isdir(found):
            raise StoreError(
                f"{self._root} cannot be a directory of a store: {found} is a file. Name a directory, or move the file away"
            )
        self.url = f"file://{self._root}"

    def _path(self, key: str) -> str:
        return os.path.join(self._root, *check_key(key).split("/"))

    @contextlib.contextmanager
    def _mapped(self, key: str, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._translate(error, key, doing) from error
        except SaveError as error:  # AtomicFile's error for a directory that was removed
            raise StoreError(f"{doing} {self.url}/{key} failed: {error}") from error

    def _translate(self, error: OSError, key: str, doing: str) -> StoreError:
        if isinstance(error, NoAtomicCreateError):
            return StoreError(f"{self.url} cannot hold a repository: {error.strerror}")
        where = f"{doing} {self.url}/{key} failed: {error.strerror or error}"
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return ObjectNotFoundError(f"{self.url}/{key} does not exist")
        if error.errno == errno.EEXIST:
            return ObjectExistsError(f"{self.url}/{key} exists already")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return StoreAccessError(
                f"{where}. Check the permissions of the directory (and that its file system has hard links)"
            )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreFullError(
                f"{where}. Free some space, or keep fewer checkpoints (keep=) and retired ones for a shorter time (grace_s=): these stay "
                "until their grace is over"
            )
        return StoreError(where)

    def put(self, key: str, data: Any) -> None:
        self._write(key, data, exclusive=False)

    def put_if_absent(self, key: str, data: Any) -> None:
        self._write(key, data, exclusive=True)

    def _write(self, key: str, data: Any, exclusive: bool) -> None:
        path = self._path(key)
        view = memoryview(data).cast("B")
        with self._mapped(key, "writing"):
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, "is a directory")
            for left in reversed(range(_PUT_TRIES)):
                try:
                    make_directories(os.path.dirname(path))
                    with committing(AtomicFile(path, exclusive=exclusive)) as file:
                        file.write(view)
                except (FileNotFoundError, SaveError):  # a concurrent delete has just removed the empty directory
                    if not left:
                        raise
                else:
                    return

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        path = self._path(key)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FileNotFoundError(errno.ENOENT, "not a file", path)
            yield fd
        finally:
            os.close(fd)

    def get(self, key: str) -> bytes:
        with self._mapped(key, "reading"), self._opened(key) as fd:
            n_bytes = os.fstat(fd).st_size
            out = bytearray(n_bytes)
            self._fill(fd, 0, memoryview(out), key)
            return bytes(out)

    def open_file(self, key: str) -> int:
        with self._mapped(key, "reading"), self._opened(key) as fd:
            return os.dup(fd)

    def get_into(self, key: str, offset: int, out: Any) -> None:
        with self._mapped(key, "reading"), self._opened(key) as fd:
            self._fill(fd, offset, memoryview(out).cast("B"), key)

    def _fill(self, fd: int, offset: int, view: memoryview, key: str) -> None:
        while view.nbytes:
            n = os.preadv(fd, [view[:_MAX_READ_BYTES]], offset)
            if n == 0:
                raise EOFError(f"{self.url}/{key} ends at byte {offset}: {view.nbytes} more were expected")
            view, offset = view[n:], offset + n

    def head(self, key: str) -> ObjectInfo:
        with self._mapped(key, "looking at"):
            found = os.lstat(self._path(key))
        if not stat.S_ISREG(found.st_mode):
            raise ObjectNotFoundError(f"{self.url}/{key} does not exist")
        return ObjectInfo(key, found.st_size, found.st_mtime)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        found = _Infos()
        with self._mapped(prefix, "listing"):
            self._walk(prefix, found)
        # Sorted completely: in the order of keys, "a-b/c" comes before "a/c"; no directory walk gives that order.
        return iter(sorted(found))

    def _walk(self, prefix: str, found: _Infos) -> None:
        directory = os.path.join(self._root, *prefix.split("/")) if prefix else self._root
        if os.path.islink(directory.rstrip("/")):
            return
        try:
            entries = [*os.scandir(directory)]
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            key = prefix + entry.name
            try:
                check_key(key)
                if entry.is_dir(follow_symlinks=False):
                    self._walk(f"{key}/", found)
                elif entry.is_file(follow_symlinks=False) and not _is_temporary(entry.name):
                    info = entry.stat(follow_symlinks=False)
                    found.append(ObjectInfo(key, info.st_size, info.st_mtime))
            except (StoreError, FileNotFoundError):  # not our file, or deleted meanwhile
                continue

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._mapped(key, "deleting"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                remove_file(path)
            directory = os.path.dirname(path)
            with contextlib.suppress(OSError):  # deleted meanwhile, or not permitted
                _remove_debris(directory)
            remove_empty_directories(directory, self._root)


def _remove_debris(directory: str) -> None:
    """Remove unfinished files of killed writers, if nothing else is left in the directory.

    Such files exist only where the file system has no unnamed files; they would keep a save's directory for ever. The search ends at
    the first other entry, so deleting all objects of a directory stays cheap.
    """
    stale = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if not _is_temporary(entry.name):
                return
            stale.append(entry.path)
    if all(time.time() - os.lstat(path).st_mtime > _STALE_S for path in stale):
        for path in stale:
            os.unlink(path)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")
