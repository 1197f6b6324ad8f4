"""The votes of one checkpoint, each read once, as far as they are needed."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future

from fastckpt.format.directory import Directory
from fastckpt.format.repository_records import Commit
from fastckpt.host.threads import WorkerPool
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.commit import open_vote
from fastckpt.repository.rank_reader import opened_votes, with_owners
from fastckpt.repository.vote_directory import read_directory
from fastckpt.store.base import Store

_DIRECTORIES_AHEAD = 8
NONE: Mapping[int, Reader] = types.MappingProxyType({})


class SavedRanks:
    """See the module; a `reading.ranks.Ranks`. Used by one thread. Errors of all methods: UnreadableError, StoreError."""

    def __init__(self, store: Store, commit: Commit, opened: Mapping[int, Reader] = NONE) -> None:
        """opened: votes that were read before."""
        self._store, self.commit = store, commit
        self._votes: dict[int, Reader] = {**opened}
        self._wholes: dict[int, Reader] = {}

    @property
    def world(self) -> int:
        """How many ranks have saved."""
        return self.commit.world

    @property
    def stored_bytes(self) -> int:
        """Of all of them."""
        return self.commit.stored_bytes

    def vote(self, rank: int) -> Reader:
        """A rank's index; of what it shares with others only its own share."""
        if rank not in self._votes:
            self._votes[rank] = open_vote(self._store, self.commit.vote(rank))
        return self._votes[rank]

    def whole(self, rank: int) -> Reader:
        """A rank's index, merged with the votes of owners."""
        if rank not in self._wholes:
            self._wholes[rank] = with_owners(self._store, self.commit, self.vote(rank))
        return self._wholes[rank]

    def directory(self, rank: int) -> Directory:
        """What a rank's vote lists; of a vote that is not needed for more, two ranges are read. Extents may be unchecked."""
        if rank in self._votes:
            return self._votes[rank].directory
        return read_directory(self._store, self.commit, rank)

    def directories(self, first: int = 0) -> Iterator[tuple[int, Directory]]:
        """Rank and directory of all votes, that of rank `first` before the others, a few of them read ahead. See `directory`."""
        ranks = deque([first, *(rank for rank in range(self.commit.world) if rank != first)])
        if len(ranks) == 1:
            yield 0, self.directory(0)
            return
        pool = WorkerPool(_DIRECTORIES_AHEAD, "fastckpt-votes")
        try:
            pending: deque[tuple[int, Future[Directory]]] = deque()
            while ranks or pending:
                while ranks and len(pending) < _DIRECTORIES_AHEAD:
                    rank = ranks.popleft()
                    pending.append((rank, pool.submit(functools.partial(self.directory, rank))))
                rank, read = pending.popleft()
                yield rank, read.result()
        finally:
            pool.close()

    def open_votes(self, ranks: Iterable[int]) -> None:
        """Open the votes of these ranks, a few at once, for `vote`."""
        for rank, opened in opened_votes(self._store, self.commit, sorted(set(ranks) - self._votes.keys())):
            self._votes[rank] = opened.result()
