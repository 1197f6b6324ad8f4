"""A base that is lost, retired or damaged costs bytes or one save, never a checkpoint; a failed save is no base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastckpt import events
from fastckpt.errors import BaseLostError, CheckpointError, CorruptCheckpointError
from fastckpt.format import keys
from fastckpt.format.keys import commit_key
from fastckpt.format.repository_records import Tombstone, tombstone_bytes
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.store.memory import MemoryStore
from fastckpt.testing.faulty_store import FaultyStore, Mode
from fastckpt.upkeep.check.repository import check_repository
from tests.support.delta_runs import OPTIONS, Run
from tests.support.repositories import check_all, living, read
from tests.support.states import same

ONE_BY_ONE = replace(OPTIONS, threads=1, connections=1)


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(3000, generator=generator)
    return {"frozen": torch.randn(2000, generator=generator).double(), "w": weights * (1 + 1e-6 * step), "step": step}


def begun(store: Store | None = None, steps: int = 2) -> Run:
    run = Run(MemoryStore() if store is None else store, ONE_BY_ONE)
    for step in range(1, steps + 1):
        run.save(step, state(step))
    return run


def bury(run: Run) -> None:
    """Retire the base."""
    assert run.base is not None
    parent = run.base.parent
    stone = tombstone_bytes(Tombstone(parent.checkpoint, parent.digest, "the test wants it", "2026-01-01T00:00:00Z"))
    run.job.repository.store.put(commit_key(parent.checkpoint), stone)


def forget(run: Run) -> None:
    assert run.base is not None
    run.job.repository.store.delete(commit_key(run.base.parent.checkpoint))


def replace_record(run: Run) -> None:
    assert run.base is not None
    store, key = run.job.repository.store, commit_key(run.base.parent.checkpoint)
    store.put(key, store.get(commit_key(keys.CheckpointId(1, 1))))


@pytest.mark.parametrize(
    ("harm", "why"),
    [(bury, "it was retired (the test wants it)"), (forget, "does not exist"), (replace_record, "as the key says")],
)
def test_a_base_that_is_lost_before_a_save_is_not_used(harm: Callable[[Run], None], why: str) -> None:
    run, seen = begun(), list[events.Event]()
    harm(run)
    assert run.base is not None
    run.base = replace(run.base, seen_s=-1e9)
    with events.subscribe(seen.append):
        commit = run.save(3, state(3))
    (told,) = (event for event in seen if isinstance(event, events.DeltasUsed))
    assert why in told.why_full
    assert run.uploaded is not None
    assert {keys.parse_pack(file.key) for file in run.uploaded.vote.files} == {keys.SaveId(1, 3, 0)}
    assert same(read(run.job.repository.store, commit), state(3))


def test_a_base_that_was_just_seen_is_not_asked_for_again() -> None:
    store = FaultyStore(MemoryStore())
    run = begun(store)
    assert run.base is not None
    record = commit_key(run.base.parent.checkpoint)
    before = store.operations.count(("get", record))
    run.save(3, state(3))
    once = store.operations.count(("get", record)) - before
    run.save(4, state(4))
    assert run.base is not None
    run.base = replace(run.base, seen_s=-1e9)
    before = store.operations.count(("get", record := commit_key(run.base.parent.checkpoint)))
    run.save(5, state(5))
    assert store.operations.count(("get", record)) - before == once + 1


def test_a_base_that_is_retired_during_the_save_ends_it() -> None:
    store = FaultyStore(MemoryStore())
    run = begun(store)
    store._hook = lambda _, verb, key, when: (
        bury(run)
        if (verb, when) == ("put", "after") and key.startswith(keys.VOTES) and "-000000000003-" in key
        else None
    )
    with pytest.raises(BaseLostError, match="written in full"):
        run.save(3, state(3))
    assert [c.step for c in living(store)] == [1]
    (left,) = check_repository(Repository(store), options=OPTIONS).unfinished
    assert left.state == "superseded"  # nobody can complete it, so a repair must not promise it
    assert "does not exist any more" in left.why
    commit = run.save(4, state(4), full=True)
    assert same(read(store, commit), state(4))


@pytest.mark.parametrize("cut", [False, True])
def test_a_pack_of_the_base_that_is_gone_ends_the_save(cut: bool) -> None:
    run = begun()
    store = run.job.repository.store
    (frozen, *_) = (info.key for info in store.list(keys.DATA))
    data = store.get(frozen)
    store.delete(frozen)
    if cut:
        store.put(frozen, data[:-1])
    with pytest.raises(CorruptCheckpointError, match=r"000000\.pack"):
        run.save(3, state(3))
    commit = run.save(4, state(4), full=True)
    assert same(read(store, commit), state(4))


@pytest.mark.parametrize("mode", ["before", "after", "delayed"])
def test_every_operation_of_a_save_with_a_base_fails_once(mode: Mode) -> None:
    """The next save is written against what was committed last, and names nothing of the one that failed."""
    counting = FaultyStore(MemoryStore())
    begun(counting).save(3, state(3))
    begin = len(begun(FaultyStore(MemoryStore())).job.repository.store.operations)  # type: ignore[attr-defined]
    for n in range(begin, len(counting.operations)):
        store = MemoryStore()
        faulty = FaultyStore(store, lambda number, verb, key, n=n: number == n, mode)  # type: ignore[misc]
        run = begun(faulty)
        base = run.base
        try:
            run.save(3, state(3))
        except CheckpointError:
            assert run.base is base
        commit = run.save(4, state(4))
        faulty.release()
        assert run.uploaded is not None
        named = {keys.parse_pack(file.key) for file in run.uploaded.vote.files}
        committed = {record.save for record in living(store).values()}
        assert named <= committed, f"operation {n}: {counting.operations[n]}"
        assert same(read(store, commit), state(4))
        check_all(store)


def test_the_next_start_goes_on_from_a_checkpoint_with_references() -> None:
    run = begun(steps=5)
    again = Run(run.job.repository.store, ONE_BY_ONE)
    again.base = None if run.base is None else replace(run.base, seen_s=-1e9)
    commit = again.save(6, state(6))
    assert same(read(again.job.repository.store, commit), state(6))
    assert again.uploaded is not None
    assert {save.epoch for file in again.uploaded.vote.files if (save := keys.parse_pack(file.key))} == {1, 2}
