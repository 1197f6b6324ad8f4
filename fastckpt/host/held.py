"""Recognises files that cannot be replaced: the name of a descriptor, a file that somebody holds open, a file in a directory that we may
not write to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import stat
from pathlib import Path

_DESCRIPTORS = re.compile(r"/proc/([0-9]+)(?:/task/[0-9]+)?/fd")
_MAX_LINKS = 40  # Linux follows no more links


def descriptor_of(path: str) -> tuple[int, int] | None:
    """Process id and number of the descriptor that a path leads to (/dev/stdout, /dev/fd/N, /proc/self/fd/N, or a link to one of these)."""
    for _ in range(_MAX_LINKS):
        directory, name = os.path.split(path)
        directory = os.path.realpath(directory or ".")
        found = _DESCRIPTORS.fullmatch(directory)
        if found and name.isdecimal():
            return int(found[1]), int(name)
        try:
            path = os.path.join(directory, os.readlink(os.path.join(directory, name)))
        except OSError:  # not a link, or nothing there
            return None
    return None


def is_own(process: int) -> bool:
    """Whether a process number of /proc means this process."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self") == str(process)
    return False


def held_open(path: str) -> bool:
    """Whether somebody, this process or another one, holds the file open: they would not see a file put in its place.

    Asked by means of a lease, which the kernel grants only on a file that nobody else has open. Where there are none (another's file, a
    network), only what this process holds is found.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:  # the file may not be written: then it is not written in place either
        return False
    try:
        if not hasattr(fcntl, "F_SETLEASE"):
            return _own_descriptor(os.fstat(fd), fd, os.O_RDONLY) is not None
        # If somebody opens the file in these microseconds, the lease is broken, and the signal for that is SIGIO, which would end this
        # process. SIGURG is ignored.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN or _own_descriptor(os.fstat(fd), fd, os.O_RDONLY) is not None
    finally:
        os.close(fd)
    return False


def held_for_writing(found: os.stat_result) -> int | None:
    """A descriptor of this process that has this file open for writing."""
    return _own_descriptor(found, -1, os.O_WRONLY)


def _own_descriptor(found: os.stat_result, but: int, least: int) -> int | None:
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # no /proc
        return None
    for number in numbers:
        with contextlib.suppress(OSError):  # closed in between
            same = os.path.samestat(os.fstat(number), found)
            if same and number != but and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE >= least:
                return number
    return None


def why_not_replaced(path: str, found: os.stat_result) -> tuple[int, str] | None:
    """The error number and a reason in words, if no other file can be put in the place of the one at the resolved `path`; else None."""
    directory = os.path.dirname(path)
    if path in mount_points():
        return errno.EBUSY, "it is a mount point"
    above = os.stat(directory)
    if above.st_mode & stat.S_ISVTX and os.geteuid() not in (0, found.st_uid, above.st_uid):
        return (
            errno.EPERM,
            f"it belongs to user {found.st_uid}, and {directory} is sticky: only its owner may replace it",
        )
    effective = os.access in os.supports_effective_ids
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=effective):
        return errno.EACCES, f"its directory {directory} may not be written"
    return None


def mount_points() -> set[str]:
    """All mount points of this process; empty if there is no /proc."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line.split(" ")[4]) for line in lines}
