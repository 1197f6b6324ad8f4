"""The votes of one checkpoint, each read once, as far as they are needed."""

from __future__ import annotations

from fastckpt.format.directory import Directory
from fastckpt.format.repository_records import Commit
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.commit import open_vote
from fastckpt.repository.rank_reader import with_owners
from fastckpt.repository.vote_directory import read_directory
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

    def directory(self, rank: int) -> Directory:
        """What a rank's vote lists; of a vote that is not needed for more, two ranges are read. Extents may be unchecked."""
        if rank in self._votes:
            return self._votes[rank].directory
        return read_directory(self._store, self.commit, rank)
