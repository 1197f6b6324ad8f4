"""Every operation of the store fails once, in every way; every object is damaged: old or new, an error or the right bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from fastckpt.errors import CheckpointError, StoreUnavailableError
from fastckpt.format import keys
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.base import Store
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Retrying, Wrapper
from fastckpt.testing.faulty_store import FaultyStore, Mode
from tests.support.repositories import check_all, history, incarnation, living, read
from tests.support.states import same, sealed, small_state


def copy_of(store: MemoryStore) -> MemoryStore:
    other = MemoryStore()
    other._objects = dict(store._objects)
    return other


def prepared() -> MemoryStore:
    """Three checkpoints of one epoch: steps 1 to 3."""
    store = MemoryStore()
    run = incarnation(store)
    for step in (1, 2, 3):
        run.save(sealed(small_state(step)), step)
    return store


def save_first(store: Store) -> None:
    incarnation(store).save(sealed(small_state(1)), 1)


def restore_and_save(store: Store) -> None:
    run = incarnation(store)
    assert run.choose_and_claim() is not None
    run.save(sealed(small_state(4)), 4)


def restore_save_retain(store: Store) -> None:
    run = incarnation(store)
    run.choose_and_claim()
    run.save(sealed(small_state(4)), 4)
    for _ in range(3):  # tombstones, then packs
        run.retain(Keep(last=1), grace_s=0.0)


SCENARIOS: dict[str, tuple[Callable[[], MemoryStore], Callable[[Store], None], set[int]]] = {
    "first save": (MemoryStore, save_first, {0, 1}),
    "restore and save": (prepared, restore_and_save, {3, 4}),
    "restore, save, retain": (prepared, restore_save_retain, {3, 4}),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("mode", ["before", "after", "delayed"])
def test_every_operation_fails_once(scenario: str, mode: Mode) -> None:
    prepare, act, allowed = SCENARIOS[scenario]
    counting = FaultyStore(prepare())
    act(counting)
    for n in range(len(counting.operations)):
        store = prepare()
        faulty = FaultyStore(store, lambda number, verb, key, n=n: number == n, mode)  # type: ignore[misc]
        where = f"operation {n}: {counting.operations[n]}"
        failed = False
        try:
            act(faulty)
        except StoreUnavailableError:
            failed = True
        except CheckpointError:
            # A create whose reply was lost meets its own object: said as what it looks like, unless Retrying is in between.
            failed = mode != "before"
            assert failed, where
        for _ in range(2):
            check_all(store)
            choice = Catalog(Repository(store)).choose()
            step = 0 if choice is None else choice.commit.save.step
            assert step in allowed, where
            if not failed:
                assert step == max(allowed), where
            if choice is not None:
                assert same(read(store, choice.commit), small_state(step)), where
            faulty.release()
        # and the next incarnation works
        after = incarnation(store)
        after.choose_and_claim()
        after.save(sealed(small_state(9)), 9)
        check_all(store)
        assert history(store)[0].step == 9


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_lost_reply_is_seen_through_by_retrying(scenario: str) -> None:
    prepare, act, allowed = SCENARIOS[scenario]
    counting = FaultyStore(prepare())
    act(counting)
    creates = 0
    for n, (verb, _) in enumerate(counting.operations):
        store = prepare()
        faulty = FaultyStore(store, lambda number, verb, key, n=n: number == n, "after")  # type: ignore[misc]
        act(Retrying(faulty, sleep=lambda pause_s: None))
        creates += verb == "put_if_absent"
        assert history(store)[0].step == max(allowed)
        check_all(store)
    assert creates >= 2


class FlipsOnce(Wrapper):
    """One bit of the answer to the n-th read of an object is wrong. Counts reads, and names the one."""

    def __init__(self, inner: Store, number: int | None = None) -> None:
        super().__init__(inner)
        self.reads, self.where = 0, ""
        self._number = number

    def get(self, key: str) -> bytes:
        data = bytearray(self.inner.get(key))
        self._flip(key, data)
        return bytes(data)

    def get_into(self, key: str, offset: int, out: Any) -> None:
        self.inner.get_into(key, offset, out)
        self._flip(key, memoryview(out).cast("B"))

    def _flip(self, key: str, data: bytearray | memoryview) -> None:
        if self.reads == self._number:
            data[len(data) // 2] ^= 4
            self.where = key
        self.reads += 1


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_bit_that_flips_on_the_way_is_read_again(scenario: str) -> None:
    """Of a record, an index or the marker. The bytes of an acknowledged step are what they were; no job is told that another took over."""
    prepare, act, allowed = SCENARIOS[scenario]
    counting = FlipsOnce(prepare())
    act(counting)
    assert counting.reads > 2
    for number in range(counting.reads):
        store = prepare()
        flipping = FlipsOnce(store, number)
        act(flipping)
        assert history(store)[0].step == max(allowed), flipping.where
        check_all(store)


def test_a_store_that_is_down_for_good_is_one_error() -> None:
    now = [0.0]

    def sleep(pause_s: float) -> None:
        now[0] += pause_s

    down = Retrying(FaultyStore(MemoryStore(), lambda *_: True), give_up_s=30, sleep=sleep, clock=lambda: now[0])
    with pytest.raises(StoreUnavailableError, match="given up after"):
        save_first(down)
    assert 20 < now[0] <= 30


ORIGINAL = prepared()
OBJECTS = [info.key for info in ORIGINAL.list("") if info.key != keys.README]


@pytest.mark.parametrize("key", OBJECTS, ids=[f"{n}-{key.split('/')[0]}" for n, key in enumerate(OBJECTS)])
@pytest.mark.parametrize("at_most", [100, pytest.param(800, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_is_an_error_or_harmless(key: str, at_most: int) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    size = len(ORIGINAL.get(key))
    positions = sorted(rng.sample(range(size), min(size, at_most)))
    for position in positions:
        store = copy_of(ORIGINAL)
        data = bytearray(store.get(key))
        data[position] ^= 1 << rng.randrange(8)
        store.put(key, bytes(data))
        noticed = _read_everything(store)
        assert noticed, f"bit flip in {key} at {position} (seed {seed})"
        assert any(key in text for text in noticed), noticed


def _read_everything(store: MemoryStore) -> list[str]:
    """Texts of all errors that reading all of a repository gives. What is read without one must be right."""
    found: list[str] = []

    def attempt(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except CheckpointError as error:
            found.append(str(error))
            return None

    repository = Repository(store)
    attempt(repository.initialise)
    listing = repository.list()
    for number in listing.epochs:
        attempt(lambda number=number: repository.epoch(number))
    for checkpoint in listing.commits:
        commit = attempt(lambda checkpoint=checkpoint: repository.commit(checkpoint))
        if commit is not None:
            value = attempt(lambda commit=commit: read(store, commit))
            assert value is None or same(value, small_state(checkpoint.step))
    return found


def test_missing_truncated_and_swapped_objects_are_errors() -> None:
    names = [key for key in OBJECTS if not key.startswith(keys.EPOCHS)]
    for key in names:
        for change in ("delete", "truncate", "swap"):
            store = copy_of(ORIGINAL)
            if change == "delete":
                store.delete(key)
            elif change == "truncate":
                store.put(key, store.get(key)[:-1])
            else:
                prefix = key.split("/")[0]
                other = next((o for o in names if o != key and o.split("/")[0] == prefix), None)
                if other is None:
                    continue
                store.put(key, ORIGINAL.get(other))
            if change == "delete" and key.startswith(keys.COMMITS):
                check_all(store)  # no record, no checkpoint: nothing else is wrong
            else:
                assert _read_everything(store), (key, change)


def test_retention_deletes_no_pack_while_a_commit_cannot_be_read() -> None:
    store = prepared()
    key = keys.commit_key(keys.CheckpointId(1, 2))
    record = store.get(key)
    store.put(key, record[:-2] + b"x\n")
    run = incarnation(store)
    run.choose_and_claim()
    run.save(sealed(small_state(4)), 4)
    packs = {info.key for info in store.list(keys.DATA)}
    for _ in range(3):
        done = run.retain(Keep(last=1), grace_s=0.0)
    assert any("no pack is deleted" in note for note in done.notes)
    assert {info.key for info in store.list(keys.DATA)} == packs
    store.put(key, record)
    for _ in range(3):
        run.retain(Keep(last=1), grace_s=0.0)
    assert [c.step for c in living(store)] == [4]
    check_all(store)
