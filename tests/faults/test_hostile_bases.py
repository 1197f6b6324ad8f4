"""Indexes with bases, changed at random under valid digests: every tool ends with an error in words, or gives the very same bits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastckpt.errors import CheckpointError
from fastckpt.format.directory import Extent, StorageEntry
from fastckpt.format.keys import SaveId
from fastckpt.format.records import Records
from fastckpt.format.repository_records import Commit, Parent, parent_to_json
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.commit import open_vote, try_commit
from fastckpt.repository.repository import Repository
from fastckpt.store.memory import MemoryStore
from fastckpt.upkeep.check.repository import check_repository
from fastckpt.upkeep.compact.elsewhere import compact_to
from fastckpt.upkeep.references import references
from fastckpt.upkeep.stored_as import stored_as
from tests.support.deltas import chain
from tests.support.repositories import OPTIONS, commit_of, place_vote, read
from tests.support.states import same

N_ROWS_CHANGED = (0, 1, 1, 2, 3)
VALUES = {
    "transform": range(11),
    "raw_bytes": (0, 1, 2, 6000, 12000, 24000, 1 << 22, (1 << 22) + 4),
    "stored_bytes": (0, 1, 40, 6000),
    "file": range(6),
    "lane_bytes": (0, 1, 2, 4, 8, 16),
}


def change_rows(rows: Records, rng: random.Random) -> None:
    for _ in range(rng.choice(N_ROWS_CHANGED)):
        row, kind = rng.randrange(len(rows)), rng.choice(["base", "base", "row", *VALUES])
        if kind == "base":
            element = rng.choice([0, 1, 2, 4, 100, 1 << 31])
            rows["parameter"][row] = np.void(
                rng.randrange(len(rows) + 2).to_bytes(4, "little") + element.to_bytes(4, "little")
            )
        elif kind == "row":
            rows[row] = rows[rng.randrange(len(rows))]
        else:
            rows[kind][row] = rng.choice(VALUES[kind])


def changed_storage(storage: StorageEntry, n_rows: int, rng: random.Random) -> StorageEntry:
    """Other extents: elsewhere, cut in two, one too many, or many small ones."""
    old = storage.extents or ()
    halves = [(one, one.n_bytes // 16 * 8) for one in old]
    choices: list[list[Extent]] = [
        [Extent(rng.randrange(n_rows), rng.choice([0, 4, 8, 5999]), storage.n_bytes)],
        [e for one, n in halves for e in (Extent(one.record, 0, n), Extent(one.record, n, one.n_bytes - n))],
        [*old, Extent(0, 0, 0)],
        [Extent(rng.randrange(n_rows), 0, 4)] * rng.randrange(1, 4),
    ]
    return storage._replace(extents=tuple(rng.choice(choices)))


def hostile(store: MemoryStore, rng: random.Random) -> Commit | None:
    """Step 9: the index of step 3, changed. None: nobody commits it."""
    parent = commit_of(store, 3)
    reader = open_vote(store, parent.vote(0))
    reader.records = reader.records.copy()
    change_rows(reader.records, rng)
    if rng.random() < 0.5:
        storages = list(reader.directory.storages)
        number = rng.randrange(len(storages))
        storages[number] = changed_storage(storages[number], len(reader.records), rng)
        reader.directory = replace(reader.directory, storages=tuple(storages))
    save = SaveId(1, 9, 0)
    place_vote(store, save, reader, parent=parent_to_json(Parent(parent.checkpoint, parent.digest)))
    return or_error(lambda: try_commit(store, save))


def or_error(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except CheckpointError:
        return None


@pytest.mark.parametrize("seed", range(3))
def test_every_tool_refuses_in_words_or_gives_the_same_bits(seed: int) -> None:
    rng, n_committed = random.Random(seed), 0
    for _ in range(40):
        store, target = MemoryStore(), MemoryStore()
        chain(store, 3)
        commit = hostile(store, rng)
        if commit is None:
            continue
        n_committed += 1
        opened: Reader = open_vote(store, commit.vote(0))
        assert stored_as(opened, commit.save).read_bytes >= 0
        references(store, [commit])
        report = check_repository(Repository(store), options=OPTIONS)
        state = {one.checkpoint.step: one.state for one in report.checkpoints}[9]
        found = or_error(lambda: read(store, commit))  # noqa: B023
        done = or_error(lambda: compact_to(store, target, step=9, options=OPTIONS))  # noqa: B023
        assert (done is None) == (found is None)
        if found is None:
            assert state != "ok"
        else:
            assert same(read(target, commit_of(target, 9)), found)
    assert n_committed > 3
