"""What a pass of retention remembers of records: as long as the LIST shows the same object, and no longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastckpt.cli.ls import list_repository
from fastckpt.errors import CorruptCheckpointError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Pin, Tombstone, pin_bytes, tombstone_bytes, utc_now
from fastckpt.format.sealed import MAX_SEALED_BYTES
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.known_records import KnownRecords
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.cloud_listing import NotAListingError, read_page
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from tests.support.repositories import OPTIONS
from tests.support.states import sealed

ONE, TWO = CheckpointId(1, 1), CheckpointId(1, 2)


class Reads(Wrapper):
    """Notes the keys that are read."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.keys: list[str] = []

    def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        assert verb != "head" or key == keys.MARKER, "the LIST has told the length"
        if verb in ("get", "get_into"):
            self.keys.append(key)
        return operation()

    def take(self) -> set[str]:
        found, self.keys = self.keys, []
        assert len(set(found)) == len(found)
        return set(found)


def test_a_record_is_read_again_only_when_the_list_shows_another_object() -> None:
    now_s = [1e9]
    store = MemoryStore(clock=lambda: now_s[0])
    run = Incarnation(Repository(store), OPTIONS)
    run.choose_and_claim()
    for step in (1, 2):
        run.save(sealed(float(step)), step)
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
    found = known.read_all(known.list())
    assert (set(found.commits), found.tombstones) == ({TWO}, {}), "what is gone is forgotten"
    assert not reads.take()


def test_ls_reads_each_record_once() -> None:
    store = MemoryStore()
    run = Incarnation(Repository(store), OPTIONS)
    run.choose_and_claim()
    for step in (1, 2, 3):
        run.save(sealed(float(step)), step)
    run.retain(Keep(last=1))
    reads = Reads(store)
    found = list_repository(Repository(reads))
    assert (found["retired"], [row["step"] for row in found["checkpoints"]]) == (2, [3])
    assert len(reads.take()) == 6, "the marker, one epoch, one commit, two tombstones; of the living vote its table of packs"


@pytest.mark.parametrize("n_bytes", [0, 100, MAX_SEALED_BYTES + 1])
def test_a_record_that_is_another_one_since_the_list_is_an_error_or_itself(n_bytes: int) -> None:
    store = MemoryStore()
    run = Incarnation(Repository(store), OPTIONS)
    run.choose_and_claim()
    run.save(sealed(1.0), 1)
    known = KnownRecords(store)
    listing = known.list()
    store.put(keys.commit_key(ONE), bytes(n_bytes))
    assert isinstance(known.read_all(listing).failed[ONE], CorruptCheckpointError)
    store.put(keys.commit_key(ONE), tombstone_bytes(Tombstone(ONE, None, "the test", utc_now())))
    assert isinstance(known.commit(ONE), Tombstone)
    store.put(keys.commit_key(TWO), bytes(n_bytes))
    assert TWO in known.read_all(known.list()).failed, "too long, or none"


@pytest.mark.parametrize("at", ["", "2026-11-27", "2026-11-27 10:00:00", "yesterday at 10:00"])
def test_a_listing_whose_times_are_none_is_no_listing(at: str) -> None:
    page = "<ListBucketResult><Contents><Key>a</Key><LastModified>{}</LastModified><Size>1</Size></Contents></ListBucketResult>"
    assert read_page(page.format("2026-11-27T10:00:00.123Z").encode()).objects == [("a", 1, 1795773600.0)]
    with pytest.raises(NotAListingError, match="an entry of it"):
        read_page(page.format(at).encode())
