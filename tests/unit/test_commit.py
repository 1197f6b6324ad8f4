"""From votes to a commit record, by many ranks: docs/guarantees.md, rows 2, 3, 6, 8, 9 and 20."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest

from fastckpt.errors import (
    CorruptCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
    RepositoryError,
    StoreUnavailableError,
)
from fastckpt.format.keys import CheckpointId, SaveId, commit_key, vote_key
from fastckpt.format.repository_records import Parent, Tombstone, tombstone_bytes, utc_now
from fastckpt.format.vote import vote_name
from fastckpt.repository.commit import list_votes, open_vote, require_vote, try_commit
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from fastckpt.testing.faulty_store import FaultyStore
from tests.support.repositories import (
    OPTIONS,
    begin,
    check_all,
    commit_of,
    flip,
    keys_of,
    living,
    place_vote,
    reuse,
    save_steps,
    vote,
)
from tests.support.states import rich_state, sealed, small_state

SAVE = SaveId(1, 7, 0)
KEY = commit_key(SAVE.checkpoint)


def small(rank: int) -> Any:
    return rich_state(rank, 1000)


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    begin(store, 4)
    return store


def record_of(store: Store) -> bytes | None:
    try:
        return store.get(KEY)
    except ObjectNotFoundError:
        return None


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_last_vote_commits_whatever_the_order(store: MemoryStore, order: tuple[int, ...]) -> None:
    for n, rank in enumerate(order):
        assert try_commit(store, SAVE) is None, f"{n} of 3 votes are no save"
        assert record_of(store) is None
        vote(store, 1, 7, rank, 3, small(rank))
    commit = try_commit(store, SAVE)
    assert commit is not None
    assert (commit.world, commit.save) == (3, SAVE)
    assert [open_vote(store, commit.vote(rank)).directory.rank for rank in range(3)] == [0, 1, 2]
    check_all(store)


def test_whoever_completes_builds_the_same_bytes(store: MemoryStore) -> None:
    for rank in range(2):
        vote(store, 1, 7, rank, 2, small(rank))
    assert try_commit(store, SAVE) is not None
    first = record_of(store)
    store.delete(KEY)
    assert try_commit(store, SAVE) is not None
    assert record_of(store) == first


def test_two_completers_at_once(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have built the record before either puts it."""
    for rank in range(2):
        vote(store, 1, 7, rank, 2, small(rank))
    both = threading.Barrier(2, timeout=30)

    created: list[str] = []

    create = store.put_if_absent

    def counted(key: str, data: Any) -> None:
        create(key, data)
        created.append(key)

    def wait(number: int, verb: str, key: str, when: str) -> None:
        if (verb, key, when) == ("put_if_absent", KEY, "before"):
            both.wait()

    monkeypatch.setattr(store, "put_if_absent", counted)
    found: list[Any] = []
    completers = [
        threading.Thread(target=lambda: found.append(try_commit(FaultyStore(store, hook=wait), SAVE))) for _ in range(2)
    ]
    for one in completers:
        one.start()
    for one in completers:
        one.join(30)
    assert created == [KEY]
    assert len(found) == 2
    assert found[0] == found[1]
    check_all(store)


def test_two_votes_of_one_rank_commit_nothing(store: MemoryStore) -> None:
    for seed in (0, 1):
        vote(store, 1, 7, 0, 1, small(seed))
    assert len(list_votes(store, SAVE)) == 2
    with pytest.raises(RepositoryError, match=r"more than one vote of ranks \[0\]"):
        try_commit(store, SAVE)
    assert record_of(store) is None


def test_ranks_that_disagree_about_the_world_commit_nothing(store: MemoryStore) -> None:
    vote(store, 1, 7, 0, 2, small(0))
    vote(store, 1, 7, 1, 3, small(1))
    with pytest.raises(RepositoryError, match=r"worlds \[2, 3\]"):
        try_commit(store, SAVE)
    assert record_of(store) is None


def test_ranks_that_continue_from_different_parents_commit_nothing(store: MemoryStore) -> None:
    save_steps(store, [1])
    before = commit_of(store, 1, 2)
    save = SaveId(3, 7, 0)
    begin(store, 2, before)
    vote(store, 3, 7, 0, 2, small(0), before)
    vote(store, 3, 7, 1, 2, small(1))
    with pytest.raises(CorruptCheckpointError, match="vote 1"):
        try_commit(store, save)
    assert CheckpointId(3, 7) not in living(store)


def test_a_vote_that_says_another_rank_than_its_name(store: MemoryStore) -> None:
    vote(store, 1, 7, 0, 2, small(0))
    place_vote(store, SAVE, open_vote(store, list_votes(store, SAVE)[0]), rank=1, world=2, epoch=9)
    with pytest.raises(CorruptCheckpointError, match="as the key says"):
        try_commit(store, SAVE)
    assert record_of(store) is None


def test_the_first_try_that_commits_is_the_checkpoint(store: MemoryStore) -> None:
    """A late vote of try 0 is debris once try 1 was committed, and completing try 0 then changes nothing."""
    vote(store, 1, 7, 0, 2, small(0))
    for rank in range(2):
        vote(store, 1, 7, rank, 2, small(10 + rank), attempt=1)
    committed = try_commit(store, SaveId(1, 7, 1))
    assert committed is not None
    record = record_of(store)
    vote(store, 1, 7, 1, 2, small(1))
    assert try_commit(store, SAVE) == committed
    assert record_of(store) == record
    assert commit_of(store, 7).save.attempt == 1


def test_a_tombstone_keeps_a_late_commit_out(store: MemoryStore) -> None:
    vote(store, 1, 7, 0, 1, small(0))
    stone = tombstone_bytes(Tombstone(SAVE.checkpoint, None, "unfinished save", utc_now()))
    store.put_if_absent(KEY, stone)
    with pytest.raises(RepositoryError, match="has been retired"):
        try_commit(store, SAVE)
    assert record_of(store) == stone


def test_a_tombstone_that_goes_while_it_is_met_keeps_the_commit_out_all_the_same(store: MemoryStore) -> None:
    class Going(Wrapper):
        def get(self, key: str) -> bytes:
            if key == KEY:
                self.inner.delete(key)
            return super().get(key)

    vote(store, 1, 7, 0, 1, small(0))
    store.put_if_absent(KEY, tombstone_bytes(Tombstone(SAVE.checkpoint, None, "unfinished save", utc_now())))
    with pytest.raises(RepositoryError, match=r"is gone again: step 7 of epoch 1 was retired.*not committed"):
        try_commit(Going(store), SAVE)
    assert record_of(store) is None


def test_a_vote_that_retention_took_is_not_waited_for(store: MemoryStore) -> None:
    """A saver that slept for longer than the grace finds its step retired and its vote deleted: nobody will place it again."""
    vote(store, 1, 7, 0, 1, small(0))
    (info,) = store.list("votes/")
    name = vote_name(SAVE, 0, 1, store.get(info.key))
    require_vote(store, name)
    store.delete(info.key)
    with pytest.raises(RepositoryError, match="was placed and is gone: step 7 was retired meanwhile"):
        require_vote(store, name)
    store.put(KEY, tombstone_bytes(Tombstone(SAVE.checkpoint, None, "unfinished save", utc_now())))
    with pytest.raises(RepositoryError, match=r"has been retired \(unfinished save\)"):
        require_vote(store, name)


def test_a_save_ends_whose_vote_is_gone(store: MemoryStore) -> None:
    class Taking(Wrapper):
        """Retention of another job, hours later: between a vote and the look at it."""

        def list(self, prefix: str) -> Any:
            if prefix.startswith("votes/"):
                for info in [*store.list("votes/")]:
                    store.delete(info.key)
            return super().list(prefix)

    run = Incarnation(Repository(Taking(store)), OPTIONS, sleep=lambda s: pytest.fail("it waits"))
    run.repository.initialise()
    run.choose_and_claim()
    with pytest.raises(RepositoryError, match="was placed and is gone"):
        run.save(sealed(small_state(1.0)), 1)


@pytest.mark.parametrize("mode", ["before", "after", "delayed"])
def test_a_lost_reply_to_the_commit(store: MemoryStore, mode: Any) -> None:
    vote(store, 1, 7, 0, 1, small(0))
    faulty = FaultyStore(store, lambda number, verb, key: (verb, key) == ("put_if_absent", KEY), mode)
    with pytest.raises(StoreUnavailableError):
        try_commit(faulty, SAVE)
    assert (record_of(store) is not None) == (mode == "after")
    commit = try_commit(store, SAVE)
    record = record_of(store)
    faulty.release()  # the first put lands at last, and meets the second
    assert record_of(store) == record
    assert try_commit(store, SAVE) == commit


def test_a_damaged_vote_commits_nothing(store: MemoryStore) -> None:
    vote(store, 1, 7, 0, 1, small(0))
    flip(store, keys_of(store, "votes/")[0])
    with pytest.raises(CorruptCheckpointError, match="digest"):
        try_commit(store, SAVE)
    assert record_of(store) is None


def test_a_vote_of_this_process_that_it_did_not_place(store: MemoryStore) -> None:
    own = vote(MemoryStore(), 1, 7, 0, 1, small(1))
    vote(store, 1, 7, 0, 1, small(0))
    with pytest.raises(RepositoryError, match="two processes"):
        try_commit(store, SAVE, own)
    assert record_of(store) is None


@pytest.mark.parametrize("what", ["missing", "longer"])
def test_packs_of_earlier_saves_are_looked_at(store: MemoryStore, what: str) -> None:
    vote(store, 1, 7, 0, 1, small(0))
    assert try_commit(store, SAVE) is not None
    pack = keys_of(store, "data/")[0]
    data = store.get(pack)
    if what == "missing":
        store.delete(pack)
    else:
        store.put(pack, data + b"\0")
    with pytest.raises(CorruptCheckpointError, match=pack):
        reuse(store, 7, 8)
    store.put(pack, data)
    assert reuse(store, 7, 9).save.step == 9
    assert CheckpointId(1, 8) not in living(store)
    check_all(store)


def test_the_name_of_a_vote_is_its_digest(store: MemoryStore) -> None:
    """Overwriting a vote by another valid one is found out: the commit record names it by digest."""
    vote(store, 1, 7, 0, 1, small(0))
    commit = try_commit(store, SAVE)
    assert commit is not None
    other = MemoryStore()
    begin(other, 1)
    vote(other, 1, 7, 0, 1, small(1))
    store.put(vote_key(commit.vote(0)), other.get(keys_of(other, "votes/")[0]))
    with pytest.raises(CorruptCheckpointError):
        open_vote(store, commit.vote(0))


def test_parents_are_named_by_digest(store: MemoryStore) -> None:
    vote(store, 1, 7, 0, 1, small(0))
    first = try_commit(store, SAVE)
    assert first is not None
    vote(store, 1, 8, 0, 1, small(1), first)
    second = try_commit(store, SaveId(1, 8, 0))
    assert second is not None
    assert second.parent == Parent(first.checkpoint, first.digest)


def test_a_record_that_was_retired_and_removed_meanwhile_is_not_put_again(store: MemoryStore) -> None:
    """Its packs are being deleted. A saver that slept between its refused put and the look at what stands there gets words."""
    vote(store, 1, 7, 0, 1, small(0))

    class Sleeper(Wrapper):
        def put_if_absent(self, key: str, data: Any) -> None:
            if key == KEY:
                raise ObjectExistsError("retention of another incarnation, hours later, has removed the tombstone too")
            super().put_if_absent(key, data)

    with pytest.raises(RepositoryError, match="was retired while it was being saved"):
        try_commit(Sleeper(store), SAVE)
    assert record_of(store) is None
