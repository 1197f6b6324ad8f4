"""Files that are replaced as a whole: creates, syncs, renames and removes them so that a crash leaves either the old file or the new one.

A new file becomes visible in one step and only when it is whole and on stable storage:

    create unnamed (O_TMPFILE) → write → fsync → link to a temporary name → rename over the target → fsync the directory

An unnamed file vanishes with the process, so a killed save leaves nothing behind. Where the file system has no O_TMPFILE, a temporary
name next to the target is used from the start, and a kill leaves that file.

Targets that cannot be replaced are written in place: `writing/sinks.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastckpt.errors import SaveError
from fastckpt.host.attributes import take_over
from fastckpt.host.direct_writer import DirectWriter, write_all

logger = logging.getLogger("fastckpt")

_COPY_BYTES = 16 << 20


def sync_directory(path: str) -> None:
    """fsync a directory. Until then a power failure may undo a rename in it."""
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
    """Warn once per process: SMB and some FUSE file systems cannot sync a directory."""
    global _warned_of_directories  # noqa: PLW0603 - told twice at worst
    if not _warned_of_directories:
        _warned_of_directories = True
        logger.warning(
            "the file system of %s cannot sync directories (%s): what is saved there survives a killed process, but perhaps no power loss",
            path,
            error.strerror,
        )


def rename_if_absent(source: str, target: str) -> None:
    """renameat2(2) with RENAME_NOREPLACE: FileExistsError if there is something at `target`. OSError if the system or the file system lacks
    this call.
    """
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
def naming(path: str) -> Iterator[None]:
    """Put the path into errors of calls that know only a descriptor: "No space left on device" alone does not say which device."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = path
        raise


class AtomicFile:
    """A Sink that replaces the file at `path` whole or not at all.

    A symbolic link is followed and stays. Other hard links keep the old file. The new file takes over the old one's owner, group,
    permissions and attributes, where this process may set them. If there was no old file, the umask decides about the permissions.
    """

    def __init__(self, path: str, *, exclusive: bool = False) -> None:
        """exclusive: `commit` raises FileExistsError if the path exists already, and does not touch it."""
        self._exclusive = exclusive
        self._path = path
        self._target = os.path.realpath(path)
        self._directory, name = os.path.split(self._target)
        # the path as given comes first, so that the error has the same words as torch.save's
        for parent in (os.path.dirname(path), self._directory):
            if parent and not os.path.isdir(parent):
                raise SaveError(f"Parent directory {parent} does not exist.")
        if os.path.isdir(self._target):
            raise SaveError(f"File {self._target} cannot be opened: it is a directory")
        short = os.fsencode(name)[:150].decode("utf-8", "ignore")  # a file name has at most 255 bytes
        self._temporary = os.path.join(self._directory, f".{short}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        self._name: str | None = None
        """The temporary name; set shortly before the file may have it, until the rename."""
        self._fd = -1
        self._writer: DirectWriter | None = None
        try:
            self._fd = self._create()
            if not exclusive:
                take_over(self._fd, self._target)  # before the file holds bytes that others must not read
            self._writer = DirectWriter(self._fd)
        except BaseException:
            self.abandon()
            raise

    def _create(self) -> int:
        if hasattr(os, "O_TMPFILE"):
            try:
                fd = os.open(self._directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
                if os.path.exists(f"/proc/self/fd/{fd}"):
                    return fd
                os.close(fd)  # this sandbox has no /proc: an unnamed file could never be given a name
            except OSError as error:
                # Not every file system has unnamed files (NFS, FUSE, old overlayfs); kernels before 3.11 answer EISDIR.
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                    raise
        self._name = self._temporary
        try:
            return os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            self._name = None  # 32 random bits were equal to another program's file name: do not remove that file
            raise

    def write(self, data: Any) -> None:
        assert self._writer is not None
        with naming(self._path):
            self._writer.write(data)

    def commit(self) -> None:
        with naming(self._path):
            self._commit()

    def _commit(self) -> None:
        assert self._writer is not None
        self._writer.flush()
        if not self._exclusive:
            take_over(
                self._fd, self._target
            )  # again: an earlier save, or another program, may have changed it meanwhile
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
        """Give the file a name, if it has none yet."""
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
        """Copy the bytes to a named file: for file systems that have unnamed files but no links."""
        named = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(named, stat.S_IMODE(os.fstat(self._fd).st_mode))
            source = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                while data := os.read(source, _COPY_BYTES):
                    write_all(named, data)
            finally:
                os.close(source)
            if not self._exclusive:
                take_over(named, self._target)
            os.fsync(named)
        finally:
            os.close(named)

    def _link_exclusively(self) -> None:
        """Create the name only if it is free: by link(2) or, where a file system has no links, by renameat2(2)."""
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
            rename_if_absent(self._temporary, self._target)
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


def make_directories(path: str) -> None:
    """mkdir -p, with an fsync of the parent for each new entry: otherwise a power failure could remove the directory and everything in
    it.
    """
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
    """Unlink durably: after a crash, an object that is removed later is never gone while this one is still there. FileNotFoundError."""
    os.unlink(path)
    sync_directory(os.path.dirname(path))


def remove_empty_directories(path: str, root: str) -> None:
    """Remove a directory and its parents below the root, as long as they are empty. A directory with other files in it is no error."""
    while path != root and path.startswith(root):
        try:
            os.rmdir(path)
        except OSError:
            return
        path = os.path.dirname(path)
