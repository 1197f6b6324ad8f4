"""Fills a folder of this machine with votes and packs of a checkpoint, for a restore that begins soon.

    choose, as a restore does ─→ votes ─→ packs, the first of every rank first ─→ crc64nvme ─→ folder, each by a rename

A restore that begins while this is under way takes what is there. Reads the store only.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastckpt._types import Progress
from fastckpt.errors import MissingObjectError, NoCheckpointError, RepositoryError, RetiredError
from fastckpt.format import keys
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import CheckpointId, vote_key
from fastckpt.format.repository_records import Commit
from fastckpt.options import Options
from fastckpt.repository.cache_folder import CacheFolder
from fastckpt.repository.catalog import Catalog, Which
from fastckpt.repository.file_tables import file_table
from fastckpt.repository.rank_reader import open_rank
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.store.wrap import Wrapper
from fastckpt.upkeep.mirror.named import votes_of
from fastckpt.upkeep.mirror.transfer import Room, in_parallel, read_pack

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class PrefetchReport:
    """What is in the folder now."""

    url: str
    folder: str
    checkpoint: CheckpointId
    world: int
    packs: int = 0
    """Of the checkpoint, for the ranks that were asked for."""
    fetched_bytes: int = 0
    present_bytes: int = 0
    """They were there, and were not fetched again."""
    left_bytes: int = 0
    """There is no room for them: a restore reads them from the store."""
    notes: list[str] = field(default_factory=list)


def prefetch(
    store: Store,
    folder: str,
    *,
    step: Which = "latest",
    ranks: Collection[int] | None = None,
    most_bytes: int | None = None,
    options: Options | None = None,
    progress: Progress = lambda done, total: None,
) -> PrefetchReport:
    """Fetch what a restore of a checkpoint reads. May be stopped anywhere, and run beside another and beside restores.

    Takes a quarter of `options.host_budget_bytes` and `options.connections` threads. Files of other checkpoints of the repository are
    removed first, and those of other repositories that nobody has prefetched for a day.

    Args:
        store: of the repository; only read.
        folder: made for this user alone if it does not exist.
        step: as for `Checkpointer.restore`.
        ranks: of the saved ranks; None: all. What others write for them is fetched, too.
        most_bytes: of packs; None: half of the free disk.
        options: None for the defaults.
        progress: called with bytes done and bytes in all.

    Raises:
        NoCheckpointError: there is none, or no such rank. RepositoryError: no repository, or others can write to the folder.
        UnreadableError, StoreError, OSError.
    """
    options = options or Options()
    try:
        return _prefetch(store, folder, step, ranks, most_bytes, options, progress)
    except (MissingObjectError, RetiredError):
        if not isinstance(step, str):
            raise
    return _prefetch(store, folder, step, ranks, most_bytes, options, progress)  # a newer one has taken its place


def _prefetch(
    store: Store,
    root: str,
    step: Which,
    ranks: Collection[int] | None,
    most_bytes: int | None,
    options: Options,
    progress: Progress,
) -> PrefetchReport:
    repository = Repository(store)
    marker = repository.marker()
    if marker is None:
        raise RepositoryError(f"{store.url} is no fastckpt repository (yet): there is no {keys.MARKER}")
    choice = Catalog(repository, checks_votes=False).choose(step)
    if choice is None:
        raise NoCheckpointError(f"{store.url} has no checkpoint yet: there is nothing to fetch")
    commit = choice.commit
    folder = CacheFolder.make(root, marker.repository)
    wanted = _Wanted(store, commit, folder, options)
    files = wanted.of_all() if ranks is None else wanted.of(sorted(ranks))
    report = PrefetchReport(store.url, folder.root, commit.checkpoint, commit.world, len(files))
    report.notes += wanted.notes
    kept_bytes = folder.keep_only({file.key for file in files} | wanted.vote_keys)
    room = (folder.free_bytes() + kept_bytes) // 2 if most_bytes is None else most_bytes
    _fetch(store, folder, _fitting(files, room, report), options, report, progress)
    progress(1, 1)
    return report


class _Wanted:
    """What a restore reads; leaves the votes in the folder as they are read."""

    def __init__(self, store: Store, commit: Commit, folder: CacheFolder, options: Options) -> None:
        self._store, self._commit, self._folder = _Leaving(store, folder), commit, folder
        self._connections = options.for_store(store.useful_connections).connections

    @property
    def vote_keys(self) -> set[str]:
        """Of the checkpoint."""
        return {vote_key(self._commit.vote(rank)) for rank in range(self._commit.world)}

    @property
    def notes(self) -> list[str]:
        return self._store.notes

    def of_all(self) -> list[FileEntry]:
        """Packs of all ranks. UnreadableError, StoreError."""
        found = []
        for name, data in votes_of(self._store, self._commit, self._connections):
            found.append(file_table(data, f"{self._store.url}/{vote_key(name)}"))
        return _in_turns(found)

    def of(self, ranks: Sequence[int]) -> list[FileEntry]:
        """Packs that these ranks read, those of owners too. NoCheckpointError: there is no such rank; UnreadableError, StoreError."""
        world, found = self._commit.world, []
        for rank in ranks:
            if not 0 <= rank < world:
                raise NoCheckpointError(
                    f"{self._store.url}: the checkpoint has ranks 0 to {world - 1}, and no rank {rank}"
                )
            reader = open_rank(self._store, self._commit, rank)
            used = np.unique(reader.records["file"][reader.records["stored_bytes"] > 0]).tolist()
            found.append(tuple(reader.files[number - 1] for number in used))
        return _in_turns(found)


class _Leaving(Wrapper):
    """Leaves each vote in the folder that somebody reads from the store."""

    def __init__(self, inner: Store, folder: CacheFolder) -> None:
        super().__init__(inner)
        self._folder = folder
        self.notes: list[str] = []

    def get(self, key: str) -> bytes:
        data = super().get(key)
        if keys.parse_vote(key) is not None:
            try:
                self._folder.put(key, data)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                self.notes = [f"there is no room for all votes in {self._folder.root}"]
        return data


def _in_turns(tables: Sequence[Sequence[FileEntry]]) -> list[FileEntry]:
    """The first pack of every rank, then the second … Pure. Each once."""
    found: dict[str, FileEntry] = {}
    for turn in range(max(map(len, tables), default=0)):
        for table in tables:
            if turn < len(table):
                found.setdefault(table[turn].key, table[turn])
    return list(found.values())


def _fitting(files: Sequence[FileEntry], room: int, report: PrefetchReport) -> list[FileEntry]:
    """The first ones that fit; what is left is noted."""
    taken, total = [], 0
    for file in files:
        if total + file.n_bytes > room:
            break
        taken.append(file)
        total += file.n_bytes
    report.left_bytes = sum(file.n_bytes for file in files[len(taken) :])
    return taken


def _fetch(
    store: Store,
    folder: CacheFolder,
    files: Sequence[FileEntry],
    options: Options,
    report: PrefetchReport,
    progress: Progress,
) -> None:
    room = Room(max(options.host_budget_bytes // 4, 1))
    total, done, present = max(sum(file.n_bytes for file in files), 1), 0, 0

    def fetch(file: FileEntry) -> bool:
        """Whether it was fetched; it may have been there."""
        if folder.size(file.key) == file.n_bytes:
            return False
        with room.take(file.n_bytes):
            folder.put(file.key, read_pack(store, file))
        return True

    connections = options.for_store(store.useful_connections).connections
    calls = (functools.partial(fetch, file) for file in files)
    n_done = 0
    try:
        for file, fetched in zip(files, in_parallel(calls, connections, "fastckpt-prefetch"), strict=False):
            done, n_done = done + file.n_bytes, n_done + 1
            present += 0 if fetched else file.n_bytes
            progress(min(done, total - 1), total)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        report.left_bytes += sum(file.n_bytes for file in files[n_done:])
        report.notes.append(f"{folder.root} is full")
    report.present_bytes, report.fetched_bytes = present, done - present


__all__ = ["PrefetchReport", "prefetch"]
