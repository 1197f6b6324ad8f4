"""Rules of a bucket that delete by age take the marker and the epoch record first; and stores that were changed under a repository."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastckpt.errors import RepositoryError, SupersededError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, commit_key
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.base import ObjectInfo
from fastckpt.store.memory import MemoryStore
from fastckpt.training.checkpointer import Checkpointer
from fastckpt.upkeep.check.repository import check_repository
from fastckpt.upkeep.repair import plan_repair, repair
from tests.support.repositories import check_all, history, incarnation, keys_of
from tests.support.states import sealed, small_state


def job(store: MemoryStore, steps: list[int]) -> Any:
    run = incarnation(store)
    run.choose_and_claim()
    for step in steps:
        run.save(sealed(small_state(step)), step)
    return run


def test_a_running_job_puts_its_records_back_and_the_next_start_goes_on() -> None:
    store = MemoryStore()
    run = job(store, [1, 2, 3])
    marker, epoch = store.get(keys.MARKER), store.get("epochs/000001.json")
    for key in keys_of(store, ""):  # the rule
        store.delete(key)
    for step in (4, 5, 6):
        run.save(sealed(small_state(step)), step)
        run.retain(Keep(last=2), grace_s=0.0)
    assert store.get(keys.MARKER) == marker
    assert store.get("epochs/000001.json") == epoch
    assert [c.step for c in history(store)] == [6, 5]
    assert incarnation(store).choose_and_claim().commit.save.step == 6  # type: ignore[union-attr]
    check_all(store)


@pytest.mark.parametrize("key", [keys.MARKER, "epochs/000001.json"])
def test_other_bytes_there_end_the_job(key: str) -> None:
    store = MemoryStore()
    run = job(store, [1])
    store.delete(key)
    other = MemoryStore()
    job(other, [1])
    store.put(key, other.get(key))
    with pytest.raises(SupersededError, match="somebody else's now"):
        run.save(sealed(small_state(2)), 2)


@pytest.mark.parametrize("end", [b"", b"x"])
def test_a_record_that_was_cut_off_is_another(end: bytes) -> None:
    store = MemoryStore()
    run = job(store, [1])
    store.put("epochs/000001.json", store.get("epochs/000001.json")[:-1] + end)
    with pytest.raises(SupersededError):
        run.save(sealed(small_state(2)), 2)


@pytest.mark.parametrize("call", ["initialise", "require"])
def test_a_repository_that_begins_between_two_requests_has_a_marker(call: str) -> None:
    """Another process makes the marker and claims an epoch after this one has looked for the marker."""

    class Late(MemoryStore):
        begun = False

        def head(self, key: str) -> ObjectInfo:
            try:
                return super().head(key)
            finally:
                if not self.begun:
                    self.begun = True
                    job(self, [1])

    store = Late()
    marker = getattr(Repository(store), call)()
    assert marker == Repository(store).marker()
    assert marker is not None


def test_a_commit_that_vanishes_is_not_acknowledged() -> None:
    class Losing(MemoryStore):
        def put_if_absent(self, key: str, data: Any) -> None:
            super().put_if_absent(key, data)
            if key == commit_key(CheckpointId(1, 2)):
                self.delete(key)

    run = job(Losing(), [1])
    with pytest.raises(RepositoryError, match="is not there any more"):
        run.save(sealed(small_state(2)), 2)


def test_the_next_number_is_above_everything_that_was_ever_written() -> None:
    store = MemoryStore()
    job(store, [1])
    job(store, [2])
    store.delete("epochs/000002.json")
    assert job(store, []).epoch.number == 3
    for key in [*keys_of(store, "epochs/"), *keys_of(store, "commits/"), *keys_of(store, "votes/")]:
        store.delete(key)
    run = incarnation(store)
    assert Repository(store).claim(None).number == 3, "of the packs"
    run.repository.initialise()


def test_the_history_follows_the_parents_of_commits_where_a_record_is_missing() -> None:
    store = MemoryStore()
    job(store, [1, 2, 3])
    rewound = incarnation(store)
    rewound.choose_and_claim(2)
    rewound.save(sealed(small_state(4.0)), 4)
    store.delete("epochs/000002.json")
    assert [c.step for c in history(store)] == [4, 2, 1], "step 3 was left behind"
    fresh = incarnation(store)
    fresh.begin(fresh=True)
    fresh.save(sealed(small_state(1.0)), 1)
    store.delete(f"epochs/{fresh.epoch.number:06}.json")  # type: ignore[union-attr]
    assert [c.step for c in history(store)] == [1]


def test_nothing_is_retired_while_the_record_of_a_living_commit_is_missing_and_a_repair_ends_that() -> None:
    store = MemoryStore()
    job(store, [1, 2])
    store.delete("epochs/000001.json")
    store.delete(keys.MARKER)
    with pytest.raises(RepositoryError, match="check --repair"):
        incarnation(store).choose_and_claim()
    report = check_repository(Repository(store))
    assert report.history == (CheckpointId(1, 2), CheckpointId(1, 1))
    todo = plan_repair(report, Catalog(Repository(store)).epoch, 0)
    assert todo.records == (0, 1)
    repair(Repository(store), todo)
    assert check_repository(Repository(store)).ok
    run = job(store, [3])
    run.retain(Keep(last=1), grace_s=0.0)
    assert [c.step for c in history(store)] == [3]


def test_expired_tombstones_are_missed_by_nobody() -> None:
    store = MemoryStore()
    run = job(store, [1, 2, 3])
    for _ in range(2):
        run.retain(Keep(last=1), grace_s=0.0)
    for step in (1, 2):
        store.delete(commit_key(CheckpointId(1, step)))
    run.save(sealed(small_state(4)), 4)
    for _ in range(2):
        assert not run.retain(Keep(last=1), grace_s=0.0).warnings
    assert [c.step for c in history(store)] == [4]
    check_all(store)


class Overwriting(MemoryStore):
    """After a move: `put_if_absent` is a put."""

    conditional = True

    def put_if_absent(self, key: str, data: Any) -> None:
        if self.conditional:
            super().put_if_absent(key, data)
        else:
            self.put(key, data)


def test_a_repository_on_a_store_that_became_unfit_is_refused_at_the_next_writing_opening() -> None:
    store = Overwriting()
    job(store, [1])
    store.conditional = False
    with pytest.raises(RepositoryError, match="overwrites"):
        Checkpointer(store, {"w": torch.zeros(2)}, spot=None)
    assert keys_of(store, "probe/") == []
    with Checkpointer(store, {"w": torch.zeros(2)}, read_only=True):
        pass  # reads all the same


def test_of_two_jobs_that_got_one_number_one_is_told() -> None:
    store = Overwriting()
    job(store, [1])
    a, b = incarnation(store), incarnation(store)
    chosen = a.choose()
    b.choose()
    store.conditional = False
    assert a.claim(chosen, "latest", set())
    a.save(sealed(small_state(2)), 2)
    store.delete("epochs/000002.json")
    store.delete(commit_key(CheckpointId(2, 2)))
    for prefix in ("votes/000002-000000000002-000/", "data/000002-000000000002-000/"):
        for key in keys_of(store, prefix):
            store.delete(key)
    assert b.claim(chosen, "latest", set())
    assert a.epoch.number == b.epoch.number  # type: ignore[union-attr]
    b.save(sealed(small_state(3)), 3)
    with pytest.raises(SupersededError):
        a.save(sealed(small_state(4)), 4)
