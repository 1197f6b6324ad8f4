"""The votes of one checkpoint, each read once, as far as they are needed."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future

from fastckpt.format.directory import Directory
from fastckpt.format.repository_records import Commit
from fastckpt.format.wholes import Wholes
from fastckpt.host.threads import WorkerPool
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.commit import open_vote
from fastckpt.repository.rank_reader import opened_votes, with_owners
from fastckpt.repository.vote_directory import parse_directory, read_directory
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

    def forget(self, rank: int) -> None:
        """Let go of a vote: 1,024 of them would take gigabytes."""
        self._votes.pop(rank, None)
        self._wholes.pop(rank, None)

    def directories(self, first: int = 0) -> Iterator[tuple[int, Directory]]:
        """Rank and directory of all votes, that of rank `first` before the others. Of a vote that was not read before, two ranges are read;
        extents are unchecked then.
        """
        for rank, found in self._texts(first):
            yield rank, self._parsed(rank, found)

    def list_in(self, wholes: Wholes, first: int) -> None:
        """Enter in `wholes` what the votes list that has something for it, that of rank `first` before the others. As `directories`; what
        has nothing is not even parsed.
        """
        wholes.add(first, self.vote(first).directory)
        for rank, found in self._texts(first):
            if rank != first and not (isinstance(found, bytes) and wholes.add_unwanted(found)):
                wholes.add(rank, self._parsed(rank, found))

    def _parsed(self, rank: int, found: Directory | bytes) -> Directory:
        return parse_directory(self._store, self.commit, rank, found) if isinstance(found, bytes) else found

    def _texts(self, first: int) -> Iterator[tuple[int, Directory | bytes]]:
        """The directory of each vote that is open, the bytes of the others', a few of them read ahead."""
        store, commit = self._store, self.commit
        waiting = deque([first, *(rank for rank in range(commit.world) if rank != first)])
        pool = WorkerPool(min(_DIRECTORIES_AHEAD, len(waiting)), "fastckpt-votes")
        pending: deque[tuple[int, Future[bytes] | None]] = deque()
        """None: the vote was read before."""
        try:
            while waiting or pending:
                while waiting and len(pending) < 2 * _DIRECTORIES_AHEAD:
                    rank = waiting.popleft()
                    reading = functools.partial(read_directory, store, commit, rank)
                    pending.append((rank, None if rank in self._votes else pool.submit(reading)))
                rank, data = pending.popleft()
                yield rank, self._votes[rank].directory if data is None else data.result()
        finally:
            pool.close()

    def open_votes(self, ranks: Iterable[int]) -> None:
        """Open the votes of these ranks, a few at once, for `vote`."""
        for rank, opened in opened_votes(self._store, self.commit, sorted(set(ranks) - self._votes.keys())):
            self._votes[rank] = opened.result()
