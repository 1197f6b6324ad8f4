"""Checks every pack that checkpoints use, reading it once: crc64nvme of the whole pack, and every chunk decoded from memory.

    votes of a checkpoint ─→ uses: which rank has which chunks in which pack ─→ what is not known yet ─→ read on workers ─→ findings

Checkpoints share packs. Chunks that were right for one checkpoint are not read again for the next; chunks that were damaged are listed
again for it. Of a damaged base only the base is listed, with the tensors of all chunks that are made from it.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastckpt.errors import CorruptCheckpointError, Damage, ObjectNotFoundError, UnsupportedFormatError
from fastckpt.format import keys, records
from fastckpt.format.digest import crc64nvme, digest
from fastckpt.format.directory import FileEntry
from fastckpt.format.records import RECORD_BYTES
from fastckpt.format.repository_records import Commit
from fastckpt.format.shares import Claims
from fastckpt.host.threads import WorkerPool
from fastckpt.kernels.transform import HAS_BASE, MAX_RAW_BYTES
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_source import BytesSource
from fastckpt.reading.sources import NoFile
from fastckpt.repository.commit import read_vote_bytes
from fastckpt.store.base import Store
from fastckpt.upkeep.check.report import ReportBuilder
from fastckpt.upkeep.check.votes import also_ranks

_LARGE_PACK_BYTES = (
    64 << 20
)  # twice the size that our writer makes; a larger pack is kept in memory only if the budget allows it


def check_packs(
    store: Store,
    commits: Sequence[Commit],
    sizes: Mapping[str, int],
    needed_bytes: int,
    options: Options,
    found: ReportBuilder,
    progress: Callable[[int, int], None],
) -> None:
    """Read all packs of these checkpoints and report damage. Their votes were checked before.

    commits: oldest first. The save that wrote a pack uses all of it, so later checkpoints share only chunks that are known by then. sizes:
    length in bytes of every existing object, by key. needed_bytes: of the packs that will be read, for `progress`, which is called on this
    thread.
    """
    pool = WorkerPool(options.threads, "fastckpt-check")
    check = _PackCheck(store, sizes, options, pool, found, lambda done: progress(min(done, needed_bytes), needed_bytes))
    try:
        for commit in commits:
            check.check(commit)
    finally:
        pool.close()
    progress(needed_bytes, needed_bytes)


class _Rows:
    """What tells the rows of one index apart, and what they are made from."""

    def __init__(self, reader: Reader) -> None:
        self.identities: list[bytes] = []
        """Of each row a digest of its pack's key, its place, all values that it is checked against, and the identities of its bases."""
        self._bases: dict[int, tuple[int, ...]] = {}
        keys_of_files = ["", *(file.key for file in reader.files)]
        files, bare = reader.records["file"].tolist(), reader.records.copy()
        based = np.isin(bare["transform"], sorted(HAS_BASE))
        bare["file"] = 0
        bare["parameter"][based] = np.void(bytes(8))  # the number of a row: another one in the next index
        data = bare.tobytes()
        for number, record in enumerate(reader.records):
            parts = [keys_of_files[files[number]].encode(), data[number * RECORD_BYTES : (number + 1) * RECORD_BYTES]]
            if based[number]:  # bases come before
                first, start, n_bytes = records.base_of(record)
                spans = start + n_bytes > int(reader.records["raw_bytes"][first])
                bases = self._bases[number] = (first, first + 1) if spans else (first,)
                parts += [start.to_bytes(8, "little"), *(self.identities[base] for base in bases)]
            self.identities.append(digest(b"".join(parts)))

    def is_of(self, number: int, bad: Container[bytes]) -> bool:
        """Whether any row that a chunk is made from is a bad one."""
        return any(self.identities[base] in bad or self.is_of(base, bad) for base in self._bases.get(number, ()))


class _Use(NamedTuple):
    """A pack as one rank's file table describes it, and the rank's chunks in it."""

    rank: int
    reader: Reader
    rows: _Rows
    entry: FileEntry
    numbers: list[int]


class _BadChunk(NamedTuple):
    use: _Use
    number: int
    damage: Damage


class _Result(NamedTuple):
    """A worker's findings in a pack."""

    n_bytes: int
    crc: int | None
    """Checksum of the whole pack. None: it was not read as a whole."""
    too_large: bool
    good: list[bytes]
    """Identities of the right chunks."""
    bad: list[_BadChunk]


class _Verdicts:
    """Known results: of packs by key, and of chunks by an identity of 16 bytes; some 100 bytes for each chunk."""

    def __init__(self) -> None:
        self.crcs: dict[str, int | None] = {}
        self._good: set[bytes] = set()
        self._bad: dict[bytes, Damage] = {}

    def enter(self, result: _Result) -> None:
        """Remember the results for the chunks of a pack that was read."""
        self._good.update(result.good)
        self._bad.update((chunk.use.rows.identities[chunk.number], chunk.damage) for chunk in result.bad)

    def lose(self, uses: Sequence[_Use]) -> None:
        """Remember that a pack is missing."""
        missing = Damage("pack", uses[0].entry.key, "an object", "none")
        self._bad.update((use.rows.identities[number], missing) for use in uses for number in use.numbers)

    def is_good(self, use: _Use, number: int) -> bool | None:
        """Whether a chunk is right. None: not known yet."""
        identity = use.rows.identities[number]
        return True if identity in self._good else False if identity in self._bad else None

    def damage(self, use: _Use, number: int) -> Damage:
        """The damage of a chunk that is known to be bad. It names the tensors of the index in which it was found."""
        return self._bad[use.rows.identities[number]]

    def is_lost_by_base(self, use: _Use, number: int) -> bool:
        """Whether a chunk is bad because something that it is made from is: that is listed."""
        return use.rows.is_of(number, self._bad)


class _PackCheck:
    """Checks the packs of one checkpoint after another."""

    def __init__(
        self,
        store: Store,
        sizes: Mapping[str, int],
        options: Options,
        pool: WorkerPool,
        found: ReportBuilder,
        progress: Callable[[int], None],
    ) -> None:
        self._store = store
        self._sizes = sizes
        self._large_bytes = max(_LARGE_PACK_BYTES, options.host_budget_bytes // (2 * options.threads))
        self._pool = pool
        self._found = found
        self._progress = progress
        self._held = HeldPack(store)
        self._claims = Claims()
        """Of the checkpoint at hand."""
        self._verdicts = _Verdicts()

    def check(self, commit: Commit) -> None:
        """Report all damage of one checkpoint's packs. StoreError, except for missing objects."""
        pending = []
        for key, uses in self._uses(commit).items():
            if key and key not in self._sizes:
                self._verdicts.lose(uses)  # listed by the check of the votes, with the tensors that are lost with it
                continue
            known = [[self._verdicts.is_good(use, number) for number in use.numbers] for use in uses]
            self._repeat(commit, uses, known)
            if key in self._verdicts.crcs and not any(None in one for one in known):
                self._compare_crcs(commit, key, uses, set())
                continue
            todo = [
                use._replace(numbers=[n for n, verdict in zip(use.numbers, one, strict=True) if verdict is None])
                for use, one in zip(uses, known, strict=True)
            ]
            pending.append((key, uses, self._pool.submit(functools.partial(self._read_pack, key, todo))))
        read = [(key, uses, future.result()) for key, uses, future in pending]
        for _, _, result in read:
            self._verdicts.enter(result)
        for key, uses, result in read:
            self._report(commit, key, uses, result)

    def _uses(self, commit: Commit) -> dict[str, list[_Use]]:
        """Uses of packs, by key. Key "": chunks without stored bytes (constant ones)."""
        uses: dict[str, list[_Use]] = defaultdict(list)
        self._claims = Claims()
        for rank in range(commit.world):
            try:
                reader = self._open(commit, rank)
            except (CorruptCheckpointError, UnsupportedFormatError, ObjectNotFoundError):
                continue  # listed by the check of the votes
            self._claims.add(rank, reader.directory)
            rows = _Rows(reader)
            unread = records.unreadable(reader.records)
            by_file: dict[int, list[int]] = defaultdict(list)
            for number, file in enumerate(reader.records["file"].tolist()):
                if number not in unread:
                    by_file[file].append(number)
            for file, numbers in by_file.items():
                entry = reader.files[file - 1] if file else FileEntry("", 0, 0)
                uses[entry.key].append(_Use(rank, reader, rows, entry, numbers))
        return uses

    def _open(self, commit: Commit, rank: int) -> Reader:
        """Open a vote. Its packs are read from this thread's memory, if the thread holds them."""
        name = commit.vote(rank)
        source = BytesSource(read_vote_bytes(self._store, name), f"{self._store.url}/{keys.vote_key(name)}")
        return Reader.open_vote(source, self._held.source)

    def _repeat(self, commit: Commit, uses: Sequence[_Use], known: Sequence[Sequence[bool | None]]) -> None:
        """List damage that is known from an earlier checkpoint, with the tensors of this one."""
        for use, verdicts in zip(uses, known, strict=True):
            for number, verdict in zip(use.numbers, verdicts, strict=True):
                if verdict is False and not self._verdicts.is_lost_by_base(use, number):
                    again = replace(self._verdicts.damage(use, number), tensors=use.reader.tensors_of(number))
                    self._add(commit, use.entry.key, use.rank, use.reader, number, again)

    def _read_pack(self, key: str, uses: Sequence[_Use]) -> _Result:
        """Runs on a worker: read a pack as a whole, then decode its chunks from memory."""
        n_bytes = self._sizes[key] if key else 0
        too_large = n_bytes > self._large_bytes
        crc = self._held.hold(key, n_bytes) if key and not too_large else None
        good, bad = [], []
        out = np.empty(MAX_RAW_BYTES, np.uint8)
        try:
            for use in uses:
                for number in use.numbers:
                    damage = use.reader.read_chunk(number, out[: int(use.reader.records["raw_bytes"][number])])
                    if damage is None:
                        good.append(use.rows.identities[number])
                    else:
                        bad.append(_BadChunk(use, number, damage))
        finally:
            self._held.release()
        return _Result(n_bytes, crc, too_large, good, bad)

    def _report(self, commit: Commit, key: str, uses: Sequence[_Use], result: _Result) -> None:
        """Report a worker's findings."""
        report = self._found.report
        for use, number, damage in result.bad:
            if self._verdicts.is_lost_by_base(use, number):
                continue
            owner = key or keys.vote_key(commit.vote(use.rank))
            self._add(
                commit, owner, use.rank, use.reader, number, replace(damage, tensors=use.reader.tensors_of(number))
            )
        report.chunks += len(result.good) + len(result.bad)
        if not key:
            return
        if key not in self._verdicts.crcs:
            self._verdicts.crcs[key] = result.crc
            report.packs += 1
            report.pack_bytes += result.n_bytes
            self._progress(report.pack_bytes)
            if result.too_large:
                words = f"{key}: {result.n_bytes} bytes do not fit the memory of a check; its chunks were read, its crc64nvme was not"
                self._found.add_unsupported(words)
        self._compare_crcs(commit, key, uses, {chunk.use.rank for chunk in result.bad})

    def _add(self, commit: Commit, key: str, rank: int, reader: Reader, chunk: int, damage: Damage) -> None:
        """Enter a damaged chunk of one rank, and who loses it with that rank."""
        also = also_ranks(rank, reader, [chunk], self._claims)
        self._found.add(key, [damage], commit.checkpoint, rank=rank, also_ranks=also)

    def _compare_crcs(self, commit: Commit, key: str, uses: Sequence[_Use], bad_ranks: Collection[int]) -> None:
        """Compare the checksum of a whole pack. If all chunks are right, the damage lies in bytes that this checkpoint does not use."""
        crc = self._verdicts.crcs[key]
        for use in uses:
            if crc is not None and crc != use.entry.crc64nvme and self._sizes[key] == use.entry.n_bytes:
                hurt = use.rank in bad_ranks or any(self._verdicts.is_good(use, n) is False for n in use.numbers)
                found = f"{crc:016x}" + ("" if hurt else ", in bytes that no tensor of this checkpoint needs")
                damage = Damage("pack", "crc64nvme of the whole", f"{use.entry.crc64nvme:016x}", found)
                self._found.add(key, [damage], commit.checkpoint if hurt else None, rank=use.rank)


class HeldPack:
    """The pack whose chunks a thread is checking, in memory: a pack costs one request, for any number of chunks."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._local = threading.local()

    def source(self, file: FileEntry) -> HeldSource:
        """A source for one pack. Threads that hold the pack read it from memory."""
        return HeldSource(self._store, file, self._local)

    def hold(self, key: str, n_bytes: int) -> int | None:
        """Read a pack whole into this thread's memory. Returns its crc64nvme; None if it was deleted or became shorter meanwhile."""
        data = np.empty(n_bytes, np.uint8)
        try:
            self._store.get_into(key, 0, data)
        except (EOFError, ObjectNotFoundError):
            return None
        self._local.key, self._local.data = key, data
        return crc64nvme(data)

    def release(self) -> None:
        """Free this thread's memory."""
        self._local.key, self._local.data = None, None


class HeldSource(NoFile):
    """A Source: a pack, from this thread's memory if the thread holds it, else from the store."""

    def __init__(self, store: Store, file: FileEntry, local: threading.local) -> None:
        self.name = f"{store.url}/{file.key}"
        self.n_bytes = file.n_bytes
        self._store, self._key, self._local = store, file.key, local

    def read_into(self, offset: int, out: Any) -> None:
        if getattr(self._local, "key", None) != self._key:
            self._store.get_into(self._key, offset, out)
            return
        data: npt.NDArray[np.uint8] = self._local.data
        view = np.frombuffer(out, np.uint8)
        if offset + view.size > data.size:
            raise EOFError(f"{self.name} has {data.size} bytes: expected {offset + view.size} or more")
        view[:] = data[offset : offset + view.size]

    def close(self) -> None:
        """Does nothing: the store belongs to the caller."""


__all__ = ["check_packs"]
