"""Power loss at every operation of a LocalStore: docs/guarantees.md, row 23, and S1–S2 of a store.

The model of power.py, for names in several directories: an object's bytes need an fsync of the file, its name an fsync of its
directory, and so does the name of each new directory in its parent. What was not synced is there or not, each entry for itself.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastckpt.errors import ObjectExistsError
from fastckpt.host import files
from fastckpt.store.local import LocalStore
from tests.crash import tools

OLD, NEW = b"old " * 50, b"new " * 70
_BEFORE = -2


class Op(NamedTuple):
    kind: str
    """write, fsync (of file n); name, unname (path → file n, or 0 for a directory); fsyncdir (path); returned."""
    file: int = -1
    path: str = ""
    data: bytes = b""


class Recorder:
    """An `after` hook for tools.watched, and a mkdir of its own: what a call did, as a list of Op."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._open: dict[int, tuple[int, str]] = {}
        self._count = 0
        self._file_of: dict[str, int] = {}

    def __call__(self, call: str, args: tuple[Any, ...], result: Any) -> None:
        if call == "open":
            path, flags = os.fspath(args[0]), args[1]
            if flags & os.O_TMPFILE == os.O_TMPFILE or flags & os.O_CREAT:
                self._count += 1
                self._open[result] = self._count, path
                if flags & os.O_TMPFILE != os.O_TMPFILE:
                    self._name(path, self._count)
            else:
                self._open[result] = 0, path
        elif call == "write":
            self.ops.append(Op("write", self._open[args[0]][0], data=bytes(args[1])[:result]))
        elif call == "fsync":
            file, path = self._open[args[0]]
            self.ops.append(Op("fsync", file) if file else Op("fsyncdir", path=path))
        elif call == "link":
            source = str(args[0])
            of_fd = source.startswith("/proc/self/fd/")
            self._name(args[1], self._open[int(source.rpartition("/")[2])][0] if of_fd else self._file_of[source])
        elif call in ("rename", "replace"):
            file = self._file_of[args[0]]
            self._name(args[1], file)
            self._unname(args[0])
        elif call in ("unlink", "remove"):
            self._unname(args[0])
        elif call == "close":
            self._open.pop(args[0], None)
        else:
            assert call in ("stat", "fstat", "lstat", "fchmod", "chmod"), f"the model does not know os.{call}"

    def _name(self, path: Any, file: int) -> None:
        self._file_of[os.fspath(path)] = file
        self.ops.append(Op("name", file, os.fspath(path)))

    def _unname(self, path: Any) -> None:
        self.ops.append(Op("unname", self._file_of.pop(os.fspath(path), -1), os.fspath(path)))

    def mkdir(self, path: str) -> None:
        os.mkdir(path)
        self.ops.append(Op("name", 0, path))


def entries_after(ops: list[Op], before: Iterable[str]) -> Iterator[dict[str, int]]:
    """All names that may be found after these operations, each as of any operation since its directory's sync.

    A name that was there before stands for file _BEFORE.
    """
    histories: dict[str, list[int | None]] = {}
    for i, op in enumerate(ops):
        if op.kind in ("name", "unname"):
            safe = any(o.kind == "fsyncdir" and o.path == os.path.dirname(op.path) for o in ops[i:])
            now = op.file if op.kind == "name" else None
            history = histories.setdefault(op.path, [_BEFORE if op.path in before else None])
            if safe:
                history[:] = [now]
            else:
                history.append(now)
    for chosen in itertools.product(*histories.values()):
        yield {path: file for path, file in zip(histories, chosen, strict=True) if file is not None}


def bytes_of(ops: list[Op], file: int) -> set[bytes]:
    """What may be read of a file: all its writes if an fsync followed, else nothing, half of it, or zeros, too."""
    writes = [i for i, op in enumerate(ops) if op.kind == "write" and op.file == file]
    whole = b"".join(ops[i].data for i in writes)
    if any(op.kind == "fsync" and op.file == file and i > max(writes, default=-1) for i, op in enumerate(ops)):
        return {whole}
    return {whole, b"", whole[: len(whole) // 2], bytes(len(whole))}


def found_at(names: dict[str, int], ops: list[Op], root: str, path: str, before: dict[str, bytes]) -> set[bytes | None]:
    """What may lie at the path: None for nothing."""
    made = {op.path for op in ops if op.kind == "name" and op.file == 0}
    parent = os.path.dirname(path)
    while parent.startswith(root):
        if parent in made and parent not in names:
            return {None}  # lost, with all that is in it
        parent = os.path.dirname(parent)
    if path in names:
        return {before[path]} if names[path] == _BEFORE else set(bytes_of(ops, names[path]))
    touched = any(op.path == path for op in ops)
    return {None if touched else before.get(path)}


def problems(ops: list[Op], root: str, path: str, old: bytes | None, new: bytes | None) -> list[str]:
    """Every state that is neither old nor new, or not new although the call had returned."""
    before = {} if old is None else {path: old}
    found = set()
    for done in range(len(ops) + 1):
        past = ops[:done]
        returned = any(op.kind == "returned" for op in past)
        for names in entries_after(past, before):
            for content in found_at(names, past, root, path, before):
                if content != new and (returned or content != old):
                    what = None if content is None else len(content)
                    found.add(f"returned={returned} after {past[-1].kind if past else 'start'}: {what} bytes")
    return sorted(found)


def record(monkeypatch: pytest.MonkeyPatch, tmpfile: bool, call: Callable[[], None]) -> list[Op]:
    recorder = Recorder()
    with monkeypatch.context() as patch, tools.watched(after=recorder, tmpfile=tmpfile):
        patch.setattr(files.os, "mkdir", recorder.mkdir, raising=False)
        call()
    return [*recorder.ops, Op("returned")]


CASES = {
    "put of a new object in new directories": ("a/b/c", None, NEW, lambda s: s.put("a/b/c", NEW)),
    "put over an object": ("x/y", OLD, NEW, lambda s: s.put("x/y", NEW)),
    "put_if_absent": ("a/b/c", None, NEW, lambda s: s.put_if_absent("a/b/c", NEW)),
    "delete": ("x/y", OLD, None, lambda s: s.delete("x/y")),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = LocalStore(tmp_path)
    store.put("x/y", OLD)
    store.put("x/z", OLD)
    return tmp_path


def recorded(case: str, root: Path, monkeypatch: pytest.MonkeyPatch, tmpfile: bool) -> tuple[list[Op], str, Any, Any]:
    key, old, new, call = CASES[case]
    store = LocalStore(root)
    ops = record(monkeypatch, tmpfile, lambda: call(store))
    return ops, os.path.join(os.path.realpath(root), key), old, new


@pytest.mark.parametrize("tmpfile", [True, False], ids=["unnamed", "named"])
@pytest.mark.parametrize("case", CASES)
def test_an_object_is_old_or_new_and_new_once_the_call_returned(
    case: str, root: Path, monkeypatch: pytest.MonkeyPatch, tmpfile: bool
) -> None:
    ops, path, old, new = recorded(case, root, monkeypatch, tmpfile)
    assert problems(ops, os.path.realpath(root), path, old, new) == []
    kinds = [op.kind for op in ops]
    assert "fsyncdir" in kinds
    if new is not None:
        assert kinds.index("fsync") < next(i for i, op in enumerate(ops) if op.kind == "name" and op.path == path)
        assert sum(op.kind == "name" and op.file == 0 for op in ops) == (
            2 if case.endswith("directories") or "absent" in case else 0
        )


@pytest.mark.parametrize("tmpfile", [True, False], ids=["unnamed", "named"])
@pytest.mark.parametrize("case", CASES)
def test_each_sync_that_is_left_out_is_reported(
    case: str, root: Path, monkeypatch: pytest.MonkeyPatch, tmpfile: bool
) -> None:
    """The bug switch: whichever sync is dropped, the detector finds a state that is neither, or a promise broken."""
    ops, path, old, new = recorded(case, root, monkeypatch, tmpfile)
    syncs = [i for i, op in enumerate(ops) if op.kind in ("fsync", "fsyncdir")]
    assert syncs
    for i in syncs:
        broken = ops[:i] + ops[i + 1 :]
        assert problems(broken, os.path.realpath(root), path, old, new), f"{case}: {ops[i]} was not missed"


def test_losing_a_race_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(root)
    ops = record(monkeypatch, True, lambda: _expect_exists(store))
    assert not [op for op in ops if op.kind in ("name", "unname")]
    assert store.get("x/y") == OLD


def _expect_exists(store: LocalStore) -> None:
    with pytest.raises(ObjectExistsError):
        store.put_if_absent("x/y", NEW)
