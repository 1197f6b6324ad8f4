"""All records of a repository as bytes, read once, several at a time: a long run has thousands, and each answer takes its time."""

from __future__ import annotations

import functools

from fastckpt.errors import UnreadableError
from fastckpt.format.keys import CheckpointId, commit_key, epoch_key
from fastckpt.format.repository_records import (
    Commit,
    Epoch,
    Tombstone,
    parse_commit_record,
    parse_epoch_record,
)
from fastckpt.repository.commit import read_sealed
from fastckpt.repository.inventory import Inventory
from fastckpt.repository.record_reader import RecordReader
from fastckpt.store.base import ObjectInfo, Store
from fastckpt.upkeep.mirror.transfer import in_parallel


class AllRecords(RecordReader):
    """Epochs and commits as the last `list` found them. Used by one thread, beside threads of its own."""

    def __init__(self, store: Store, connections: int) -> None:
        super().__init__(store)
        self._connections = connections
        self._read: dict[str, bytes | UnreadableError] = {}

    def list(self) -> Inventory:
        """Names, and reads all that they name. StoreError."""
        listing = super().list()
        wanted = [*map(epoch_key, listing.epochs), *map(commit_key, listing.commits)]
        calls = (functools.partial(self._bytes_or_error, key, listing.infos[key]) for key in wanted)
        found = in_parallel(calls, self._connections, "fastckpt-records")
        self._read = dict(zip(wanted, found, strict=True))
        return listing

    def _bytes_or_error(self, key: str, listed: ObjectInfo) -> bytes | UnreadableError:
        try:
            return read_sealed(self.store, key, listed)
        except UnreadableError as error:  # raised to whoever needs this record
            return error

    def data(self, key: str) -> bytes:
        """The bytes of a record that was listed. UnreadableError."""
        found = self._read[key]
        if isinstance(found, UnreadableError):
            raise found
        return found

    def epoch(self, number: int) -> Epoch:
        return parse_epoch_record(self.data(epoch_key(number)), number, f"{self.url}/{epoch_key(number)}")

    def commit(self, checkpoint: CheckpointId) -> Commit | Tombstone:
        return parse_commit_record(self.data(commit_key(checkpoint)), checkpoint, self.location(checkpoint))

    def epochs(self, listing: Inventory) -> dict[int, bytes]:
        """The bytes of all epoch records, each checked. UnreadableError."""
        return {self.epoch(number).number: self.data(epoch_key(number)) for number in listing.epochs}


__all__ = ["AllRecords"]
