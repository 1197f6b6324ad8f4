"""Records of a repository that is looked at again and again: each is read once."""

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
    """Remembers what records say by key, time and size as the last LIST told them; what a LIST shows no more is forgotten.

    Names are never remembered, and no failure is. One thread at a time.
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
        others = {key: info for key, info in self._infos.items() if not key.startswith(listed)}
        self._infos = {**others, **infos}
        self._known = {key: known for key, known in self._known.items() if self._infos.get(key) == known[0]}

    def commit(self, checkpoint: CheckpointId) -> Commit | Tombstone:
        return self._once(keys.commit_key(checkpoint), lambda: super(KnownRecords, self).commit(checkpoint))

    def epoch(self, number: int) -> Epoch:
        return self._once(keys.epoch_key(number), lambda: super(KnownRecords, self).epoch(number))

    def pin(self, name: str) -> Pin:
        return self._once(keys.pin_key(name), lambda: super(KnownRecords, self).pin(name))

    def _once(self, key: str, read: Callable[[], T]) -> T:
        info, known = self._infos.get(key), self._known.get(key)
        if known is not None and known[0] == info:
            return known[1]  # type: ignore[return-value]
        found = read()
        if info is not None:
            self._known[key] = info, found
        return found
