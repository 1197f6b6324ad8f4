"""Reads the records of a repository; nothing here writes.

Every method may be called from several threads. Errors: StoreError's subclasses, and UnreadableError's.
"""

from __future__ import annotations

from typing import NamedTuple

from fastckpt.errors import MissingObjectError, UnreadableError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Commit, Epoch, Pin, Tombstone, parse_epoch_record, parse_pin
from fastckpt.repository.commit import read_again, read_commit, read_sealed
from fastckpt.repository.inventory import Inventory, take_inventory
from fastckpt.store.base import ObjectInfo, Store


class AllCommits(NamedTuple):
    """The records at all commit keys."""

    commits: dict[CheckpointId, Commit]
    tombstones: dict[CheckpointId, Tombstone]
    failed: dict[CheckpointId, UnreadableError]
    """Records that could not be read, and why."""
    missing: set[CheckpointId]
    """Records that were deleted after the LIST."""


class RecordReader:
    """Epochs, commits and pins of a repository. Does not own the store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def url(self) -> str:
        return self.store.url

    def location(self, checkpoint: CheckpointId) -> str:
        """The place of a checkpoint's commit record, for messages."""
        return f"{self.url}/{keys.commit_key(checkpoint)}"

    def list(self) -> Inventory:
        """Names of epochs and commits."""
        return take_inventory(self.store, keys.EPOCHS, keys.COMMITS)

    def newest_epoch(self) -> int:
        """The highest claimed number; 0 if there is none."""
        return take_inventory(self.store, keys.EPOCHS).newest_epoch

    def epoch(self, number: int) -> Epoch:
        """An epoch record."""
        key = keys.epoch_key(number)
        return read_again(
            lambda: parse_epoch_record(read_sealed(self.store, key, self._listed(key)), number, f"{self.url}/{key}")
        )

    def commit(self, checkpoint: CheckpointId) -> Commit | Tombstone:
        """Read the record at a commit key."""
        return read_commit(self.store, checkpoint, self._listed(keys.commit_key(checkpoint)))

    def _listed(self, key: str) -> ObjectInfo | None:
        """Facts about an object that are known without a request. None here, because this class remembers no names."""
        return None

    def pins(self) -> dict[str, ObjectInfo]:
        """Names of pins, by a LIST."""
        return dict(take_inventory(self.store, keys.PINS).pins)

    def pin(self, name: str) -> Pin:
        """A pin."""
        key = keys.pin_key(name)
        return read_again(lambda: parse_pin(read_sealed(self.store, key, self._listed(key)), f"{self.url}/{key}"))

    def read_all(self, listing: Inventory) -> AllCommits:
        """Read all commit records and tombstones; records that could not be read come with their error."""
        found = AllCommits({}, {}, {}, set())
        for checkpoint in listing.commits:
            try:
                record = self.commit(checkpoint)
            except MissingObjectError:  # replaced by a tombstone, if all is well
                found.missing.add(checkpoint)
            except UnreadableError as error:
                found.failed[checkpoint] = error
            else:
                if isinstance(record, Commit):
                    found.commits[checkpoint] = record
                else:
                    found.tombstones[checkpoint] = record
        return found
