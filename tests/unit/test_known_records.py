"""What a pass of retention remembers of records: as long as the LIST shows the same object, and no longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastckpt.errors import ObjectNotFoundError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Pin, Tombstone, pin_bytes, tombstone_bytes, utc_now
from fastckpt.incarnation import Incarnation
from fastckpt.known_records import KnownRecords
from fastckpt.repository import Repository
from fastckpt.store.cloud_listing import NotAListingError, read_page
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from tests.repositories import OPTIONS, captured

ONE, TWO = CheckpointId(1, 1), CheckpointId(1, 2)


class Reads(Wrapper):
    """Notes the keys that are read."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.keys: list[str] = []

    def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        if verb in ("get", "get_into"):
            self.keys.append(key)
        return operation()

    def take(self) -> set[str]:
        found, self.keys = set(self.keys), []
        return found


def test_a_record_is_read_again_only_when_the_list_shows_another_object() -> None:
    now_s = [1e9]
    store = MemoryStore(clock=lambda: now_s[0])
    run = Incarnation(Repository(store), OPTIONS)
    run.restore()
    for step in (1, 2):
        run.save(captured(float(step)), step)
    pin = pin_bytes(Pin(ONE, 10, "the test", utc_now()))
    store.put(keys.pin_key("p"), pin)
    reads = Reads(store)
    known = KnownRecords(reads)

    def look() -> None:
        known.read_all(known.list())
        for name in known.pins():
            known.pin(name)

    look()
    assert reads.take() == {keys.commit_key(ONE), keys.commit_key(TWO), keys.pin_key("p")}
    look()
    assert not reads.take(), "nothing has changed"
    now_s[0] += 1
    store.put(keys.commit_key(ONE), tombstone_bytes(Tombstone(ONE, None, "the test", utc_now())))
    look()
    assert reads.take() == {keys.commit_key(ONE)}
    store.put(keys.pin_key("p"), pin)
    look()
    assert reads.take() == {keys.pin_key("p")}, "the same bytes, written again"
    store.delete(keys.commit_key(ONE))
    look()
    with pytest.raises(ObjectNotFoundError):
        known.commit(ONE)


@pytest.mark.parametrize("at", ["", "2026-11-27", "2026-11-27 10:00:00", "yesterday at 10:00"])
def test_a_listing_whose_times_are_none_is_no_listing(at: str) -> None:
    page = "<ListBucketResult><Contents><Key>a</Key><LastModified>{}</LastModified><Size>1</Size></Contents></ListBucketResult>"
    assert read_page(page.format("2026-11-27T10:00:00.123Z").encode()).objects == [("a", 1, 1795773600.0)]
    with pytest.raises(NotAListingError, match="an entry of it"):
        read_page(page.format(at).encode())
