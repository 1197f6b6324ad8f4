"""Records of a repository that is inspected again and again: each record is read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Commit, Epoch, Pin, Tombstone
from fastckpt.repository.inventory import Inventory
from fastckpt.repository.record_reader import RecordReader
from fastckpt.store.base import ObjectInfo, Store

T = TypeVar("T")


class KnownRecords(RecordReader):
    """Remembers the content of records, by key, time and size from the last LIST. A record that a LIST no longer shows is forgotten.

    Names and failures are never remembered. Reading a record takes one request, because the LIST has given its length. One thread at a
    time.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._infos: dict[str, ObjectInfo] = {}
        self._known: dict[str, tuple[ObjectInfo, object]] = {}

    def list(self) -> Inventory:
        listing = super().list()
        self._see(listing.infos, (keys.EPOCHS, keys.COMMITS))
        return listing

    def pins(self) -> dict[str, ObjectInfo]:
        found = super().pins()
        self._see({keys.pin_key(name): info for name, info in found.items()}, (keys.PINS,))
        return found

    def _see(self, infos: Mapping[str, ObjectInfo], listed: tuple[str, ...]) -> None:
        """Accept a listing: afterwards exactly these objects are known among the keys under `listed`."""
        for key in [key for key in self._infos if key.startswith(listed) and key not in infos]:
            del self._infos[key]
        for key in [key for key, (info, _) in self._known.items() if key.startswith(listed) and infos.get(key) != info]:
            del self._known[key]
        self._infos.update(infos)

    def _listed(self, key: str) -> ObjectInfo | None:
        return self._infos.get(key)

    def commit(self, checkpoint: CheckpointId) -> Commit | Tombstone:
        return self._once(keys.commit_key(checkpoint), lambda: super(KnownRecords, self).commit(checkpoint))

    def epoch(self, number: int) -> Epoch:
        return self._once(keys.epoch_key(number), lambda: super(KnownRecords, self).epoch(number))

    def pin(self, name: str) -> Pin:
        return self._once(keys.pin_key(name), lambda: super(KnownRecords, self).pin(name))

    def _once(self, key: str, read: Callable[[], T]) -> T:
        known = self._known.get(key)
        if known is not None:
            return known[1]  # type: ignore[return-value]
        found, info = read(), self._infos.get(key)
        if info is not None:
            self._known[key] = info, found
        return found
