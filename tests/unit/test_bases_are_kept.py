"""Packs of earlier saves that checkpoints name: who keeps them and for how long, and how that is known with few requests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastckpt import events
from fastckpt.errors import BaseLostError, CorruptCheckpointError
from fastckpt.format.keys import CheckpointId, SaveId, commit_key, pack_key, vote_key
from fastckpt.format.pack_ranges import ranges_of, ranges_of_json, ranges_to_json, split_key
from fastckpt.format.repository_records import Commit, Tombstone, parse_commit_record, tombstone_bytes, utc_now
from fastckpt.format.sealed import seal
from fastckpt.repository import commit as committing
from fastckpt.repository.catalog import Catalog, complete_pending
from fastckpt.repository.collector import Collector
from fastckpt.repository.commit import open_vote, try_commit
from fastckpt.repository.file_tables import packs_of
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep, RetentionPlan, plan_retention
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from tests.support.repositories import (
    as_parent,
    begin,
    check_all,
    commit_of,
    flip,
    keys_of,
    living,
    place_vote,
    reuse,
    save_ranks,
    save_steps,
)
from tests.support.states import rich_state, sealed

GRACE_S = 100.0


class Timed(MemoryStore):
    def __init__(self) -> None:
        super().__init__(clock=lambda: self.now_s)
        self.now_s = 1000.0


def one_pass(store: Timed, keep: Keep, grace_s: float = GRACE_S) -> RetentionPlan:
    """By a process that has just started: it remembers nothing."""
    store.put("data/clock", b"")  # the store's clock is read off what it lists
    collector = Collector(Repository(store))
    todo = plan_retention(collector.look(), keep, (), grace_s)
    collector.run(todo, None)
    return todo


def packs_of_step(store: MemoryStore, step: int) -> list[str]:
    return keys_of(store, f"data/000001-{step:012}-000/")


def test_the_grace_of_a_pack_counts_from_the_last_checkpoint_that_named_it() -> None:
    store = Timed()
    job = save_steps(store, [1])
    reuse(store, 1, 2)
    one_pass(store, Keep(last=1))
    store.now_s += 10 * GRACE_S  # the tombstone of step 1 is old
    assert one_pass(store, Keep(last=1)).held.base
    assert packs_of_step(store, 1)
    reuse_parent = commit_of(store, 2)
    save_steps_on(store, job, 3)
    one_pass(store, Keep(last=1))
    assert isinstance(Repository(store).commit(reuse_parent.checkpoint), Tombstone)
    store.now_s += GRACE_S - 1
    assert one_pass(store, Keep(last=1)).held.grace
    assert packs_of_step(store, 1), "somebody may read step 2, or be about to commit what refers to it"
    store.now_s += 1
    assert one_pass(store, Keep(last=1)).held == (one_pass(store, Keep(last=1)).held.stored, 0, 0)
    assert not packs_of_step(store, 1)
    check_all(store)


def save_steps_on(store: MemoryStore, job: Any, *steps: int) -> None:
    for step in steps:
        job.last = None
        job.save(sealed(rich_state(step, 100)), step)


def test_a_tombstone_of_another_version_keeps_all_packs_for_a_grace() -> None:
    """It does not say what its checkpoint named."""
    store = Timed()
    job = save_steps(store, [1])
    reuse(store, 1, 2)
    one_pass(store, Keep(last=1))
    store.now_s += 10 * GRACE_S
    save_steps_on(store, job, 3)
    of = commit_of(store, 2).digest
    store.put(
        commit_key(CheckpointId(1, 2)), tombstone_bytes(Tombstone(CheckpointId(1, 2), of, "retention", utc_now()))
    )
    store.now_s += GRACE_S - 1
    one_pass(store, Keep(last=1))
    assert packs_of_step(store, 1)
    store.now_s += 1
    one_pass(store, Keep(last=1))
    assert not packs_of_step(store, 1)


def test_what_a_tombstone_says() -> None:
    named = ranges_of([pack_key(SaveId(1, 2, 0), 3, n) for n in (0, 1, 2, 5)])
    stone = Tombstone(CheckpointId(1, 4), "ab" * 16, "retention", utc_now(), named)
    data = tombstone_bytes(stone)
    assert b'"named": {"000001-000000000002-000/r00003": [[0,2],[5,5]]}' in data
    assert parse_commit_record(data, stone.checkpoint, "") == stone
    bad: list[Any] = [[], {"x": [[0, 1]]}, {"000001-000000000002-000/r00003": [[2, 1]]}]
    for one in bad:
        members = {"epoch": 1, "step": 4, "of": None, "why": "", "utc": "", "named": one}
        with pytest.raises(CorruptCheckpointError, match="named"):
            parse_commit_record(seal("tombstone", members), stone.checkpoint, "")


packs = st.builds(
    pack_key, st.builds(SaveId, st.integers(1, 3), st.integers(0, 3), st.just(0)), st.integers(0, 2), st.integers(0, 9)
)


@given(st.sets(packs), packs)
def test_ranges_hold_exactly_the_packs_they_were_made_of(some: set[str], one: str) -> None:
    found = ranges_of_json(ranges_to_json(ranges_of(some)))
    assert found == ranges_of(some)
    folder, number = split_key(one)
    assert (one in some) == any(first <= number <= last for first, last in found.get(folder, ()))


class Counted(Wrapper):
    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.seen: list[tuple[str, str]] = []
        self.vote_bytes = 0

    def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        self.seen.append((verb, key.partition("/")[0]))
        return operation()

    def get_into(self, key: str, offset: int, out: Any) -> None:
        self.vote_bytes += len(out) if key.startswith("votes/") else 0
        super().get_into(key, offset, out)


def test_packs_of_earlier_saves_are_known_by_two_ranges_of_a_vote() -> None:
    store = MemoryStore()
    save_steps(store, [1])
    commit = reuse(store, 1, 2)
    counted = Counted(store)
    assert packs_of(counted, commit) == set(packs_of_step(store, 1))
    assert counted.seen == [("get_into", "votes")] * 2
    assert counted.vote_bytes < commit.votes[0].n_bytes / 5


@pytest.mark.parametrize("part", ["file table", "footer"])
@pytest.mark.parametrize("at", range(0, 100, 9))
def test_a_table_that_is_not_as_its_digest_says_is_not_believed(part: str, at: int) -> None:
    store = MemoryStore()
    save_steps(store, [1])
    commit = reuse(store, 1, 2)
    offset, n_bytes = commit.votes[0].parts["file table"]
    offset = offset + at % n_bytes if part == "file table" else commit.votes[0].n_bytes - 256 + at
    flip(store, vote_key(commit.vote(0)), offset)
    view = Collector(Repository(store)).look()
    if view.needed is not None:  # a flip in another part's entry of the footer is found by the footer's checksum
        assert view.needed == set(packs_of_step(store, 1))
    with pytest.raises(CorruptCheckpointError):
        packs_of(store, commit)


def refers_to(store: MemoryStore, old: int, new: int) -> SaveId:
    """Votes of a save that names packs of an earlier one, all placed; nobody has committed it yet."""
    save, parent = SaveId(1, new, 0), commit_of(store, old)
    place_vote(store, save, open_vote(store, parent.vote(0)), parent=as_parent(parent))
    return save


def test_a_save_whose_base_was_retired_is_not_committed() -> None:
    store = Timed()
    job = save_steps(store, [1])
    save = refers_to(store, 1, 3)
    save_steps_on(store, job, 2)
    collector = Collector(Repository(store))
    todo = plan_retention(collector.look(), Keep(last=1), (), GRACE_S)
    collector.run(todo, None)
    with pytest.raises(BaseLostError, match=r"step 3 refers to packs of the checkpoint 1-1.* written in full"):
        try_commit(store, save)
    assert complete_pending(Repository(store), Catalog(Repository(store))) == []
    assert CheckpointId(1, 3) not in living(store)


@pytest.mark.parametrize("change", [{"parent": None}, {"parent": {"epoch": 1, "step": 1, "digest": "0" * 32}}])
def test_nor_is_one_that_names_no_parent_or_another_record(change: dict[str, Any]) -> None:
    store = MemoryStore()
    save_steps(store, [1])
    save = SaveId(1, 2, 0)
    place_vote(store, save, open_vote(store, commit_of(store, 1).vote(0)), **change)
    with pytest.raises(BaseLostError):
        try_commit(store, save)


def test_who_comes_after_the_commit_finds_it_though_the_base_is_retired() -> None:
    store = MemoryStore()
    save_steps(store, [1])
    save = refers_to(store, 1, 2)
    first = try_commit(store, save)
    collector = Collector(Repository(store))
    todo = plan_retention(collector.look(), Keep(last=1), (), GRACE_S)
    todo.delete = []
    collector.run(todo, None)
    assert isinstance(Repository(store).commit(CheckpointId(1, 1)), Tombstone)
    assert try_commit(store, save) == first


def test_a_process_that_was_stopped_before_its_commit_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is retired, and its packs are gone, while the process stands between the last look and the commit."""
    store, clock_s = Timed(), [0.0]
    job = save_steps(store, [1])
    save = refers_to(store, 1, 3)
    save_steps_on(store, job, 2)
    monkeypatch.setattr(committing, "seconds_since_boot", lambda: clock_s[0])

    class Stopping(Wrapper):
        stopped = False

        def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
            found = operation()
            if key == commit_key(CheckpointId(1, 1)) and not self.stopped:
                self.stopped = True
                for _ in range(3):
                    one_pass(store, Keep(last=1))
                    store.now_s += 2 * GRACE_S
                    clock_s[0] += 2 * GRACE_S
                assert not packs_of_step(store, 1)
            return found

    with pytest.raises(BaseLostError):
        try_commit(Stopping(store), save)
    check_all(store)


def test_sizes_of_packs_of_earlier_saves_take_a_list_for_each_save() -> None:
    store = MemoryStore()
    save_steps(store, [1])
    save = refers_to(store, 1, 2)
    counted = Counted(store)
    assert isinstance(try_commit(counted, save), Commit)
    assert counted.seen.count(("list", "data")) == 1
    assert not counted.seen.count(("head", "data"))
    counted.seen.clear()
    assert Catalog(Repository(counted)).choose() is not None
    assert counted.seen.count(("list", "data")) == 2, "its own, and the earlier one's"


def test_beyond_the_cap_the_oldest_useless_packs_of_this_epoch_go_before_their_grace() -> None:
    store = Timed()
    told: list[events.RetentionEnded] = []
    job = save_steps(store, [])
    with events.subscribe(lambda e: told.append(e) if isinstance(e, events.RetentionEnded) else None):
        for step in range(1, 8):
            save_steps_on(store, job, step)
            store.now_s += 1.0
            n_bytes = sum(len(store.get(key)) for key in packs_of_step(store, step))
            job.retain(Keep(last=2, max_grace_bytes=2 * n_bytes + 100), GRACE_S)
    assert told[-1].grace_bytes <= 2 * n_bytes + 100
    assert told[-1].stored_bytes == sum(len(store.get(key)) for key in keys_of(store, "data/"))
    left = {SaveId(1, step, 0) for step in range(1, 8) if packs_of_step(store, step)}
    assert {save.step for save in left} == {3, 4, 5, 6, 7}, "two of the two graces' worth wait, the older ones are gone"
    assert keys_of(store, "commits/"), "tombstones keep what they keep out"
    check_all(store)


def test_the_cap_leaves_packs_of_other_epochs() -> None:
    store = Timed()
    save_steps(store, [1, 2])
    later = save_steps(store, [])
    save_steps_on(store, later, 5, 6)
    for _ in range(3):
        later.retain(Keep(last=1, max_grace_bytes=0), GRACE_S)
        store.now_s += 1.0
    assert packs_of_step(store, 1)
    assert not keys_of(store, "data/000002-000000000005-000/")
    assert keys_of(store, "data/000002-000000000006-000/")


def test_nothing_that_is_needed_goes_for_the_cap() -> None:
    store = Timed()
    job = save_steps(store, [1])
    reuse(store, 1, 2)
    for _ in range(3):
        job.retain(Keep(last=1, max_grace_bytes=0), GRACE_S)
    assert packs_of_step(store, 1)
    check_all(store)


def test_threads_read_the_tables_of_many_ranks_at_once() -> None:
    store, names = MemoryStore(), set()

    class Seen(Wrapper):
        def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
            names.add(threading.current_thread().name)
            return operation()

    begin(store, 4)
    commit = save_ranks(store, 1, 1, [{"rank": rank} for rank in range(4)])
    assert packs_of(Seen(store), commit) == set(keys_of(store, "data/"))
    assert all(name.startswith("fastckpt-tables") for name in names)


def test_a_pass_costs_as_much_after_hundreds_of_saves_that_refer_to_the_first() -> None:
    """What a frozen backbone makes: all checkpoints name packs of the first save."""
    store = Timed()
    counted = Counted(store)
    save_steps(store, [1])
    collector, costs = Collector(Repository(counted)), []
    for step in range(2, 161):
        reuse(store, step - 1, step)
        store.now_s += GRACE_S / 5
        counted.seen.clear()
        todo = plan_retention(collector.look(), Keep(last=3), (), GRACE_S)
        collector.run(todo, 1)
        costs.append(len(counted.seen))
    early, late = sum(costs[30:60]), sum(costs[-30:])
    assert late <= early, (early, late)
    assert late / 30 < 30
    assert [c.step for c in sorted(living(store))] == [158, 159, 160]
    assert packs_of_step(store, 1)
    assert len(keys_of(store, "commits/")) < 25
    check_all(store)
