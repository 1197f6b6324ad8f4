"""Copies attributes from a replaced file to the new one: owner, group, permissions, access list, extended attributes.

An attribute that this process may not set is left as it is, without a warning: torch.save writes into the old file and needs no such right.
"""

from __future__ import annotations

import contextlib
import os
import stat

_ACCESS_LIST = "system.posix_acl_access"
_OF_THE_CONTENT = frozenset({"security.capability", "security.evm", "security.ima"})
"""These attributes vouch for bytes that are being replaced. The kernel, too, removes capabilities from a file that is written."""
_PRIVILEGES = stat.S_ISUID | stat.S_ISGID


def take_over(fd: int, old: str) -> None:
    """Give the open file the attributes of the one at `old`. Does nothing if there is no file."""
    try:
        found = os.stat(old)
    except FileNotFoundError:
        return
    # Owner last: a process that gives a file away may not change it afterwards.
    _take_over_attributes(fd, old)
    mode = stat.S_IMODE(found.st_mode)
    with contextlib.suppress(OSError):  # a file system without permissions
        os.fchmod(fd, mode & ~_PRIVILEGES)
    for owner, group in ((-1, found.st_gid), (found.st_uid, -1)):
        with contextlib.suppress(OSError):
            os.fchown(fd, owner, group)
    now = os.fstat(fd)
    # A program that runs with its owner's rights must not get another owner. (A write by anybody but root removes those rights.)
    if mode & _PRIVILEGES and os.geteuid() == 0 and (now.st_uid, now.st_gid) == (found.st_uid, found.st_gid):
        with contextlib.suppress(OSError):
            os.fchmod(fd, mode)


def _take_over_attributes(fd: int, old: str) -> None:
    if not hasattr(os, "listxattr"):  # macOS
        return
    names: list[str] = []
    with contextlib.suppress(OSError):  # a file system that has none
        names = os.listxattr(old)
    for name in names:
        if name not in _OF_THE_CONTENT:
            with contextlib.suppress(OSError):
                os.setxattr(fd, name, os.getxattr(old, name))
    if _ACCESS_LIST not in names:
        # The directory's default access list could open the new file to people for whom the old one was closed.
        with contextlib.suppress(OSError):
            os.removexattr(fd, _ACCESS_LIST)
