"""A model of a disk whose power fails: from the operations of a save, every state that may be found afterwards.

What POSIX promises and nothing more: an fsync of a file keeps its bytes, an fsync of a directory keeps the names in it. All else may be
kept or lost, in any order and any mix: each write for itself (its bytes lost, or zeros where the length was kept), the names by operation.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Op(NamedTuple):
    kind: str
    """create, write, fsync, fsyncdir, link, rename, unlink, returned."""
    file: int = -1
    data: bytes = b""
    name: str = ""
    to: str = ""


class Recorder:
    """An `after` hook for tools.watched: what a save did, as a list of Op."""

    def __init__(self, directory: Path) -> None:
        self._directory = os.path.realpath(directory)
        self._files: dict[int, int] = {}
        self._directories: set[int] = set()
        self._count = 0
        self.ops: list[Op] = []

    def __call__(self, call: str, args: tuple[Any, ...], result: Any) -> None:
        handler = getattr(self, f"_{call}", None)
        if handler is not None:
            handler(args, result)
        elif call not in ("stat", "fstat", "lstat", "fchmod", "chmod"):
            raise AssertionError(f"the model does not know os.{call}")

    def _open(self, args: tuple[Any, ...], fd: int) -> None:
        path, flags = os.path.realpath(args[0]), args[1]
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            self._create(fd, "")
        elif flags & os.O_CREAT:
            assert flags & os.O_EXCL
            assert os.path.dirname(path) == self._directory
            self._create(fd, os.path.basename(path))
        else:
            assert path == self._directory
            self._directories.add(fd)

    def _create(self, fd: int, name: str) -> None:
        self._count += 1
        self._files[fd] = self._count
        self.ops.append(Op("create", self._count, name=name))

    def _write(self, args: tuple[Any, ...], n: int) -> None:
        self.ops.append(Op("write", self._files[args[0]], data=bytes(args[1])[:n]))

    def _fsync(self, args: tuple[Any, ...], _: None) -> None:
        fd = args[0]
        self.ops.append(Op("fsyncdir") if fd in self._directories else Op("fsync", self._files[fd]))

    def _link(self, args: tuple[Any, ...], _: None) -> None:
        fd = int(args[0].removeprefix("/proc/self/fd/"))
        self.ops.append(Op("link", self._files[fd], name=os.path.basename(args[1])))

    def _rename(self, args: tuple[Any, ...], _: None) -> None:
        self.ops.append(Op("rename", name=os.path.basename(args[0]), to=os.path.basename(args[1])))

    _replace = _rename

    def _unlink(self, args: tuple[Any, ...], _: None) -> None:
        self.ops.append(Op("unlink", name=os.path.basename(args[0])))

    def _close(self, args: tuple[Any, ...], _: None) -> None:
        self._files.pop(args[0], None)
        self._directories.discard(args[0])


@dataclass
class _File:
    writes: list[bytes] = field(default_factory=list)
    synced: int = 0
    """How many of the writes an fsync has made safe."""

    def contents(self) -> set[bytes]:
        """All that may be read of it: the synced writes, then any fate of the others."""
        safe, loose = b"".join(self.writes[: self.synced]), self.writes[self.synced :]
        found = {safe, safe + b"".join(loose)}
        for kept in range(len(loose)):
            before, lost = safe + b"".join(loose[:kept]), loose[kept]
            after = b"".join(loose[kept + 1 :])
            found.add(before)  # cut at a write
            found.add(before + lost[: len(lost) // 2])  # cut inside a write: pages are smaller
            found.add(before + bytes(len(lost)) + after)  # one write lost, the length and the others kept
            found.add(before + bytes(len(lost) + len(after)))  # the length kept, the bytes not
        return found


def _names_after(names: dict[str, int], ops: Iterable[Op]) -> dict[str, int] | None:
    """The directory after these operations; None if they are impossible in this order."""
    names = dict(names)
    for op in ops:
        if op.kind in ("create", "link"):
            names[op.name] = op.file
        elif op.name not in names:
            return None
        elif op.kind == "rename":
            names[op.to] = names.pop(op.name)
        else:
            del names[op.name]
    return names


def _directories(names: dict[str, int], loose: Sequence[Op]) -> list[dict[str, int]]:
    """Every directory that may be found: any choice of the unsynced operations, in any order that is possible at all.

    A rename whose source was made by a lost link is found too: the journal of a directory may hold the new entry alone.
    """
    found: list[dict[str, int]] = []
    for n in range(len(loose) + 1):
        for chosen in itertools.permutations(loose, n):
            if (directory := _names_after(names, chosen)) is not None and directory not in found:
                found.append(directory)
    whole = _names_after(names, loose)
    assert whole is not None
    for before in list(found):
        for name in whole.keys() | before.keys():  # each entry as old or new, by itself: a rename is two entries
            mixed = dict(before)
            if name in whole:
                mixed[name] = whole[name]
            if mixed not in found:
                found.append(mixed)
    return found


def states_after_power_loss(ops: Sequence[Op], target: str, old: bytes) -> Iterator[tuple[int, bool, bytes | None]]:
    """(operations done, whether save had returned, what may be at the target: None for no file), all of them."""
    files = {0: _File([old], 1)}
    names: dict[str, int] = {target: 0}
    loose: list[Op] = []
    returned = False
    for done in range(len(ops) + 1):
        seen: set[bytes | None] = set()
        for directory in _directories(names, loose):
            seen |= files[directory[target]].contents() if target in directory else {None}
        for content in sorted(seen, key=lambda c: (c is None, c)):
            yield done, returned, content
        if done == len(ops):
            return
        op = ops[done]
        if op.kind == "create":
            files[op.file] = _File()
            if op.name:
                loose.append(op)
        elif op.kind == "write":
            files[op.file].writes.append(op.data)
        elif op.kind == "fsync":
            files[op.file].synced = len(files[op.file].writes)
        elif op.kind in ("link", "rename", "unlink"):
            loose.append(op)
        elif op.kind == "fsyncdir":
            after = _names_after(names, loose)
            assert after is not None
            names, loose = after, []
        elif op.kind == "returned":
            returned = True
