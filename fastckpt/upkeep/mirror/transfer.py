"""Carries packs from one store to another: several at once, within a number of bytes, each verified by its checksum on the way.

    pack of the source ─→ memory ─→ crc64nvme of the file table ─→ put_if_absent

Nothing is decoded. A pack that the target has in its full length stays there unread, unless its content is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import numpy as np

from fastckpt._types import U8
from fastckpt.errors import CorruptCheckpointError, Damage, MissingObjectError, ObjectExistsError, TooLargeError
from fastckpt.format.digest import crc64nvme
from fastckpt.format.directory import FileEntry
from fastckpt.host.threads import WorkerPool
from fastckpt.options import Options
from fastckpt.repository.commit import named_object
from fastckpt.store.base import Store

T = TypeVar("T")

_ORDINARY_BYTES = 64 << 20
"""More than any pack that fastckpt writes. What is larger is allocated only if the source really has so much."""
_READS = 2  # a checksum that does not fit may be the link's fault: the pack is read once more


class Carried(NamedTuple):
    """What became of one pack."""

    file: FileEntry
    sent: bool
    """False: the target had it."""
    replaced: bool = False
    """The target had something else under this key."""


class Room:
    """A number of bytes of memory that threads take and give back. What is larger than all of it is let in alone."""

    def __init__(self, n_bytes: int) -> None:
        self._all = self._free = n_bytes
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, n_bytes: int) -> Iterator[None]:
        """Wait until there is room."""
        n_bytes = min(n_bytes, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= n_bytes)
            self._free -= n_bytes
        try:
            yield
        finally:
            with self._changed:
                self._free += n_bytes
                self._changed.notify_all()


def in_parallel(calls: Iterable[Callable[[], T]], threads: int, name: str) -> Iterator[T]:
    """Results in the order of the calls, a few of which run ahead. The first error ends it, after the calls that have begun."""
    pool = WorkerPool(threads, name)
    try:
        pending: deque[Future[T]] = deque()
        for call in calls:
            if len(pending) >= 2 * threads:
                yield pending.popleft().result()
            pending.append(pool.submit(call))
        while pending:
            yield pending.popleft().result()
    finally:
        pool.close()


class Transfer:
    """See the module. Used by one thread, beside threads of its own."""

    def __init__(self, source: Store, target: Store, options: Options, *, contents: bool = False) -> None:
        """options: `connections`, a quarter of `host_budget_bytes`, and `max_load_bytes` for one pack. contents: read and compare what the
        target has, too.
        """
        self._source, self._target, self._contents = source, target, contents
        # A disk gains nothing from more than two, but a bucket at the other side does.
        self.connections = max(options.for_store(side.useful_connections).connections for side in (source, target))
        self._most_bytes = options.max_load_bytes
        self._room = Room(max(options.host_budget_bytes // 4, 1))

    def carry(self, files: Iterable[FileEntry], there: Mapping[str, int]) -> Iterator[Carried]:
        """Bring these packs to the target. there: lengths of what it has, by key.

        CorruptCheckpointError: a pack of the source is not what the file table says. MissingObjectError: the source has it no more.
        TooLargeError, StoreError.
        """
        calls = (functools.partial(self._carry, file, there.get(file.key)) for file in files)
        return in_parallel(calls, self.connections, "fastckpt-mirror")

    def _carry(self, file: FileEntry, found_bytes: int | None) -> Carried:
        if found_bytes == file.n_bytes and not self._contents:
            return Carried(file, sent=False)
        self._require_room(file)
        with self._room.take(file.n_bytes):
            if found_bytes == file.n_bytes and self._target_has(file):
                return Carried(file, sent=False)
            data = read_pack(self._source, file)
            if found_bytes is not None:  # this key can have no other content: what lies there is damaged
                self._target.put(file.key, data)
                return Carried(file, sent=True, replaced=True)
            try:
                self._target.put_if_absent(file.key, data)
            except ObjectExistsError:  # of another mirror, which has verified it, too
                if self._target.head(file.key).n_bytes != file.n_bytes:
                    raise
                return Carried(file, sent=False)
        return Carried(file, sent=True)

    def _target_has(self, file: FileEntry) -> bool:
        try:
            return crc64nvme(_whole(self._target, file)) == file.crc64nvme
        except (EOFError, MissingObjectError):
            return False

    def _require_room(self, file: FileEntry) -> None:
        if file.n_bytes <= _ORDINARY_BYTES:
            return
        with named_object(self._source, file.key):
            found = self._source.head(file.key).n_bytes
        if found != file.n_bytes:
            raise _damaged(self._source, file, f"{file.n_bytes} bytes", f"{found} bytes")
        if found > self._most_bytes:
            raise TooLargeError(
                f"{self._source.url}/{file.key} has {found} bytes: more than max_load_bytes = {self._most_bytes}, and it travels whole. "
                "Set FASTCKPT_MAX_LOAD_BYTES"
            )


def read_pack(store: Store, file: FileEntry) -> U8:
    """The bytes of a pack, verified; read twice where they do not fit. CorruptCheckpointError, MissingObjectError, StoreError."""
    expected, found = f"{file.crc64nvme:016x}", ""
    for _ in range(_READS):
        try:
            data = _whole(store, file)
        except EOFError as error:
            raise _damaged(store, file, f"{file.n_bytes} bytes", str(error)) from error
        found = f"{crc64nvme(data):016x}"
        if found == expected:
            return data
    raise _damaged(store, file, f"crc64nvme {expected}", found)


def _whole(store: Store, file: FileEntry) -> U8:
    out = np.empty(file.n_bytes, np.uint8)
    with named_object(store, file.key):
        store.get_into(file.key, 0, out)
    return out


def _damaged(store: Store, file: FileEntry, expected: str, found: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{store.url}/{file.key}", [Damage("pack", file.key, expected, found)])


__all__ = ["Carried", "Room", "Transfer", "in_parallel", "read_pack"]
