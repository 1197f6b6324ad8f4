"""The votes of one checkpoint, each read once, as far as they are needed."""

from __future__ import annotations

import functools
from collections import deque
from concurrent.futures import Future

from fastckpt.format.repository_records import Commit
from fastckpt.format.wholes import Wholes
from fastckpt.host.threads import WorkerPool
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.commit import open_vote
from fastckpt.repository.rank_reader import with_owners
from fastckpt.repository.vote_directory import parse_directory, read_directory
from fastckpt.store.base import Store


class SavedRanks:
    """See the module. Used by one thread. Errors of all methods: UnreadableError, StoreError."""

    def __init__(self, store: Store, commit: Commit) -> None:
        self._store, self.commit = store, commit
        self._votes: dict[int, Reader] = {}
        self._wholes: dict[int, Reader] = {}

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

    def forget(self, rank: int) -> None:
        """Let go of a vote: 1,024 of them would take gigabytes."""
        self._votes.pop(rank, None)
        self._wholes.pop(rank, None)

    def list_in(self, wholes: Wholes, first: int, connections: int) -> None:
        """Enter in `wholes` what all votes list, that of rank `first` before the others. Of a vote that was not read before, two ranges
        are read; a few votes ahead, by `connections` threads.
        """
        store, commit = self._store, self.commit
        wholes.add(first, self.vote(first).directory)
        others = deque(rank for rank in range(commit.world) if rank != first)
        if not others:
            return
        pool = WorkerPool(min(connections, len(others)), "fastckpt-votes")
        pending: deque[tuple[int, Future[bytes] | None]] = deque()
        """None: the vote was read before."""
        try:
            while others or pending:
                while others and len(pending) < 2 * connections:
                    rank = others.popleft()
                    reading = functools.partial(read_directory, store, commit, rank)
                    pending.append((rank, None if rank in self._votes else pool.submit(reading)))
                rank, data = pending.popleft()
                if data is None:
                    wholes.add(rank, self.vote(rank).directory)
                    continue
                text = data.result()
                if not wholes.add_unwanted(text):
                    wholes.add(rank, parse_directory(store, commit, rank, text))
        finally:
            pool.close()
