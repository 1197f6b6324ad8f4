"""What commit records and votes that came from the store say of votes and packs: by this a cache's files are verified."""

from __future__ import annotations

import threading
from typing import NamedTuple

from fastckpt.errors import CheckpointError
from fastckpt.format import keys
from fastckpt.format.container import FOOTER_BYTES, READ_SHARED, parse_footer
from fastckpt.format.digest import digest
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import CheckpointId, VoteName
from fastckpt.format.repository_records import Commit, parse_commit_record
from fastckpt.repository.file_tables import file_table

_VOTES = 1024
"""Votes whose file tables are remembered: those of the checkpoint that is restored, whatever is saved beside it."""


class _Packs(NamedTuple):
    """What a vote says of packs."""

    files: dict[str, FileEntry]
    shared: bool
    """The rank writes for others, too."""


class CacheNames:
    """What commit records that came from the store name. Any thread. Forgets the oldest: a run commits for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._votes: dict[VoteName, _Packs | None] = {}
        """None: a vote that was not read yet."""

    def add_commit(self, checkpoint: CheckpointId, data: bytes, source: str) -> None:
        """Note the votes of a commit record, as it was read; a tombstone has none."""
        try:
            commit = parse_commit_record(data, checkpoint, source)
        except CheckpointError:  # whoever reads it is told
            return
        if isinstance(commit, Commit):
            with self._lock:
                for rank in range(commit.world):
                    self._votes.setdefault(commit.vote(rank), None)
                self._forget(max(_VOTES, commit.world))

    def add_vote(self, vote: VoteName, data: bytes, source: str) -> None:
        """Note the file table of a vote whose name somebody has from a commit record."""
        if digest(data).hex() != vote.digest:
            return
        try:
            files = {file.key: file for file in file_table(data, source)}
            shared = bool(parse_footer(data[-FOOTER_BYTES:], len(data), source).header.read_features & READ_SHARED)
        except CheckpointError:  # whoever reads it is told
            files, shared = {}, False
        with self._lock:
            self._votes[vote] = _Packs(files, shared)
            self._forget(max(_VOTES, vote.world))

    def _forget(self, most: int) -> None:
        for vote in list(self._votes)[: max(0, len(self._votes) - most)]:
            del self._votes[vote]

    def unread(self, rank: int | None) -> list[VoteName]:
        """Votes of a rank that were not read yet."""
        with self._lock:
            return [vote for vote, packs in self._votes.items() if packs is None and vote.rank == rank]

    def file(self, key: str) -> FileEntry | None:
        """A pack's length and checksum, as far as known."""
        with self._lock:
            return next((packs.files[key] for packs in self._votes.values() if packs and key in packs.files), None)

    def is_shared(self, key: str) -> bool:
        """Whether a pack is of a rank that writes for others, too."""
        with self._lock:
            return any(packs.shared for packs in self._votes.values() if packs and key in packs.files)


def rank_of_pack(key: str) -> int | None:
    """The rank that wrote a pack."""
    return None if keys.parse_pack(key) is None else int(key.split("/")[2][1:])


__all__ = ["CacheNames", "rank_of_pack"]
