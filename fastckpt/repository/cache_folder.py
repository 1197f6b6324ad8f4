"""A folder of this machine that holds packs and votes of repositories, so that a restore need not fetch them.

    DIR/<id of the repository>/data/…     as in the repository
                              /votes/…

A file appears whole, by a rename. It is a copy that may vanish, be cut or be overwritten at any time: whoever reads it verifies it, and
falls back to the store. Nothing is synced: what a power loss leaves is found by its checksum.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from typing import Any

from fastckpt.errors import RepositoryError
from fastckpt.store.base import check_key

_ID = re.compile(r"[0-9a-f]{32}")
_OTHERS_CAN_WRITE = 0o022
_STALE_S = 24 * 3600.0
"""How long a repository's files stay that nobody has prefetched since."""
_UNFINISHED_S = 3600.0
_NEEDED_S = 3600.0
_READ_BYTES = 1 << 30
_PIECE_BYTES = 1 << 20
"""Stays in the cache of a core while it is verified."""


class CacheFolder:
    """The files of one repository. Any thread. Reads give None for whatever cannot be read, and never raise."""

    def __init__(self, root: str, repository: str) -> None:
        """root: DIR. repository: the id in its marker."""
        self.root = os.path.realpath(os.path.expanduser(root))
        self.repository = repository
        self._own = os.path.join(self.root, repository)

    @classmethod
    def make(cls, root: str, repository: str) -> CacheFolder:
        """Make the folder, for this user alone. RepositoryError if others could write there; OSError."""
        folder = cls(root, repository)
        _make_folders(folder.root)
        why = folder.why_not()
        if why is not None:
            raise RepositoryError(f"{why}. Name a folder inside of it, which is made for this user alone")
        _make_folders(folder._own)
        os.utime(folder._own)
        return folder

    @property
    def exists(self) -> bool:
        """Whether there is anything of this repository: a prefetch may just begin."""
        return os.path.isdir(self._own)

    def why_not(self) -> str | None:
        """Why files from here are not to be used, in words; None if they are."""
        try:
            found = os.stat(self.root)
        except OSError as error:
            return f"the cache {self.root} cannot be used: {error.strerror}"
        if not stat.S_ISDIR(found.st_mode):
            return f"the cache {self.root} is no folder"
        if found.st_uid not in (os.geteuid(), 0):
            return f"the cache {self.root} belongs to another user ({found.st_uid})"
        if found.st_mode & _OTHERS_CAN_WRITE:
            return f"the cache {self.root} can be written to by other users (mode {stat.S_IMODE(found.st_mode):o})"
        return None

    def size(self, key: str) -> int | None:
        """Length of a file."""
        try:
            found = os.lstat(self._path(key))
        except OSError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read(self, key: str, n_bytes: int) -> bytearray | None:
        """A file of exactly this length, whole."""
        if self.size(key) != n_bytes:
            return None
        out = bytearray(n_bytes)
        return out if self.read_into(key, 0, out) else None

    def pieces(self, key: str, n_bytes: int) -> Iterator[memoryview]:
        """The bytes of a file of exactly this length, piece by piece, all in one buffer. OSError: it cannot be read, or ends before."""
        buffer = memoryview(bytearray(min(n_bytes, _PIECE_BYTES)))
        for offset in range(0, n_bytes, _PIECE_BYTES):
            piece = buffer[: n_bytes - offset]
            if not self.read_into(key, offset, piece):
                raise OSError(f"{key} cannot be read")
            yield piece

    def read_into(self, key: str, offset: int, out: Any) -> bool:
        """Fill a buffer from a file. False: it is not there, or ends before that; the buffer may be partly written then."""
        view = memoryview(out).cast("B")
        try:
            with self._opened(key) as fd:
                while view.nbytes:
                    n = os.preadv(fd, [view[:_READ_BYTES]], offset)
                    if n == 0:
                        return False
                    view, offset = view[n:], offset + n
        except OSError:
            return False
        return True

    def open(self, key: str) -> int | None:
        """The descriptor of a file; the caller closes it."""
        try:
            with self._opened(key) as fd:
                return os.dup(fd)
        except OSError:
            return None

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        """A regular file below the root, reached without a link: a pipe in its place must not stop a restore."""
        path = self._path(key)
        if os.path.realpath(os.path.dirname(path)) != os.path.dirname(path):
            raise FileNotFoundError(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FileNotFoundError(path)
            yield fd
        finally:
            os.close(fd)

    def put(self, key: str, data: Any) -> None:
        """Write a file, whole or not at all; replaces an older one. OSError: there is no room, no right."""
        path = self._path(key)
        _make_folders(os.path.dirname(path))
        part = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.tmp")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                view = memoryview(data).cast("B")
                while view.nbytes:
                    view = view[os.write(fd, view) :]
            finally:
                os.close(fd)
            os.rename(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise

    def remove(self, key: str) -> None:
        """Remove a file that is not what it should be."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(key))

    def claim(self, key: str, limit_s: float) -> bool:
        """Whether the caller is the one process of this machine that is to fetch a file; it calls `let_go` at the end. The claim of a
        process that was killed counts for `limit_s`.
        """
        path = self._claim_path(key)
        for _ in range(2):
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                return True
            try:
                if time.time() - os.lstat(path).st_mtime <= limit_s:
                    return False
            except OSError:
                continue
            self.let_go(key)
        return False

    def is_claimed(self, key: str) -> bool:
        """Whether some process is fetching a file."""
        return os.path.lexists(self._claim_path(key))

    def let_go(self, key: str) -> None:
        """End a claim."""
        with contextlib.suppress(OSError):
            os.unlink(self._claim_path(key))

    def _claim_path(self, key: str) -> str:
        return os.path.join(self._own, f".claim-{key.replace('/', '+')}.tmp")

    def remove_before(self, folder: str, first: str) -> None:
        """Remove folders in `folder` (as "data") whose names sort before `first`: of earlier saves.

        Those stay into which something has come within the last hour: the checkpoint that is restored may name packs of theirs, which
        another process or a prefetch has just brought.
        """
        last_s = time.time() - _NEEDED_S
        with contextlib.suppress(OSError):
            for entry in os.scandir(os.path.join(self._own, folder)):
                if entry.name < first and entry.is_dir(follow_symlinks=False) and _changed_s(entry.path) < last_s:
                    shutil.rmtree(entry.path, ignore_errors=True)

    def keep_only(self, wanted: Collection[str]) -> int:
        """Remove all other files of this repository, and other repositories that nobody has prefetched for a day. Returns the bytes of
        what stays.
        """
        kept, now_s = 0, time.time()
        for folder, _, names in os.walk(self._own):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):
                    found = os.lstat(path)
                    if os.path.relpath(path, self._own) in wanted:
                        kept += found.st_size
                    elif not name.endswith(".tmp") or now_s - found.st_mtime > _UNFINISHED_S:
                        os.unlink(path)
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.root):
                other = _ID.fullmatch(entry.name) and entry.path != self._own and entry.is_dir(follow_symlinks=False)
                if other and now_s - entry.stat(follow_symlinks=False).st_mtime > _STALE_S:
                    shutil.rmtree(entry.path, ignore_errors=True)
        return kept

    def free_bytes(self) -> int:
        """Room on the disk, for this user. OSError."""
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    def _path(self, key: str) -> str:
        return os.path.join(self._own, *check_key(key).split("/"))


def _changed_s(path: str) -> float:
    """When a file last came into a folder of a save, or into one of a rank in it."""
    below = [entry.path for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
    return max(os.lstat(one).st_mtime for one in (path, *below))


def _make_folders(path: str) -> None:
    """Make a folder, and those above it, for this user alone: `os.makedirs` gives the ones above to others, too."""
    if not os.path.isdir(path):
        _make_folders(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)


__all__ = ["CacheFolder"]
