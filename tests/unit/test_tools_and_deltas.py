"""`check`, `mirror`, `cp` and `prefetch` of checkpoints that name packs of earlier saves, and hostile ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastckpt.errors import CheckpointError, CorruptCheckpointError, UnsupportedFormatError
from fastckpt.format import keys, records
from fastckpt.format.digest import crc64nvme, digest
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import SaveId, commit_key
from fastckpt.format.repository_records import Commit, Parent, parent_to_json
from fastckpt.kernels.transform import Transform
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.commit import open_vote, try_commit
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.testing.faulty_store import FaultyStore
from fastckpt.upkeep.check.report import RepositoryReport
from fastckpt.upkeep.check.repository import check_repository
from fastckpt.upkeep.compact.elsewhere import compact_to
from fastckpt.upkeep.mirror.mirror import mirror
from fastckpt.upkeep.mirror.plan import MirrorAsked
from fastckpt.upkeep.prefetch import prefetch
from fastckpt.upkeep.salvage.chunks import bad_chunks
from tests.support.deltas import chain, chain_state
from tests.support.repositories import OPTIONS, check_all, commit_of, flip, keys_of, place_vote, read
from tests.support.states import same

PACK_OF = "data/000001-{:012}-000/r00000/000000.pack"


def checked(store: Store) -> RepositoryReport:
    return check_repository(Repository(store), options=OPTIONS)


def states_of(report: RepositoryReport) -> dict[int, str]:
    return {one.checkpoint.step: one.state for one in report.checkpoints}


# -- check -------------------------------------------------------------------------------------------------------------


def test_check_verifies_bases_and_reads_every_pack_once() -> None:
    store = MemoryStore()
    chain(store, 4)
    watched = FaultyStore(store)
    report = checked(watched)
    assert report.ok
    assert report.packs == 4
    assert report.pack_bytes == sum(info.n_bytes for info in store.list(keys.DATA))
    wholes = [key for verb, key in watched.operations if verb == "get_into" and keys.parse_pack(key)]
    assert len(set(wholes)) == 4


def test_damage_in_a_base_names_all_tensors_and_all_checkpoints_that_need_it() -> None:
    store = MemoryStore()
    chain(store, 3)
    flip(store, PACK_OF.format(1), 40)  # of a_master, which later saves are differences from, and b_copy is cast from
    report = checked(store)
    assert states_of(report) == {1: "damaged", 2: "damaged", 3: "damaged"}
    lost = {one.checkpoint.step: set(one.tensors_lost) for one in report.checkpoints}
    assert lost == {step: {"a_master", "b_copy"} for step in (1, 2, 3)}
    assert {finding.key for finding in report.findings} == {
        PACK_OF.format(1)
    }  # the packs that are right are not blamed
    assert len([f for f in report.findings if f.damage.part != "pack"]) == 3  # the base alone, once for each checkpoint


def test_a_missing_pack_of_an_earlier_save_is_named_with_what_is_made_from_it() -> None:
    store = MemoryStore()
    chain(store, 3)
    store.delete(PACK_OF.format(1))
    report = checked(store)
    assert {finding.key for finding in report.findings} == {PACK_OF.format(1)}
    lost = {one.checkpoint.step: set(one.tensors_lost) for one in report.checkpoints}
    assert {"a_master", "b_copy", "frozen", "slow"} <= lost[3]
    quick = check_repository(Repository(store), quick=True, options=OPTIONS)
    assert states_of(quick) == {1: "damaged", 2: "damaged", 3: "damaged"}


def test_damage_in_a_difference_is_that_of_its_own_checkpoints_alone() -> None:
    store = MemoryStore()
    chain(store, 3)
    flip(store, PACK_OF.format(2), 40)
    assert states_of(checked(store)) == {1: "ok", 2: "damaged", 3: "damaged"}


def test_a_row_with_another_base_is_not_taken_for_the_one_that_was_right() -> None:
    """The same stored bytes and the same digest, made from a base that was replaced by other, intact bytes."""
    store = MemoryStore()
    chain(store, 3)

    def replace_base(reader: Reader) -> None:
        row = int(np.flatnonzero(reader.records["transform"] == Transform.SUBPACK)[0])
        first = records.base_of(reader.records[row])[0]
        other = bytes(range(250)) * (int(reader.records["raw_bytes"][first]) // 250 + 1)
        other = other[: int(reader.records["raw_bytes"][first])]
        key = PACK_OF.format(9)
        store.put(key, other)
        reader.files = (*reader.files, FileEntry(key, len(other), crc64nvme(other)))
        rows, file = bytearray(reader.records.tobytes()), len(reader.files)
        where = (file, 0, len(other), len(other), digest(other), crc64nvme(other), bytes(8))
        records.fill(rows, first, Transform.RAW, 1, 0, *where)
        reader.records = records.unpack(bytes(rows))

    _vote(store, replace_base)
    found = checked(store)
    assert states_of(found) == {1: "ok", 2: "ok", 3: "ok", 9: "damaged"}


# -- copies ------------------------------------------------------------------------------------------------------------


def test_a_mirror_brings_packs_of_earlier_saves_once_and_a_second_run_only_what_is_new() -> None:
    source, target = MemoryStore(), MemoryStore()
    chain(source, 3)
    first = mirror(source, target, MirrorAsked(step=2), OPTIONS)
    assert [c.step for c in first.copied] == [2]
    assert keys_of(target, keys.DATA) == [PACK_OF.format(1), PACK_OF.format(2)]
    assert same(read(target, commit_of(target, 2)), chain_state(2))
    watched = FaultyStore(target)
    second = mirror(source, watched, options=OPTIONS)
    assert [c.step for c in second.copied] == [3, 1]
    packs = [key for verb, key in watched.operations if verb.startswith("put") and key.startswith(keys.DATA)]
    assert packs == [PACK_OF.format(3)]
    check_all(target)
    assert checked(target).ok


def test_prefetch_leaves_all_packs_that_a_restore_reads(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    chain(store, 3)
    for ranks in (None, [0]):
        folder = str(tmp_path / f"cache-{ranks}")
        report = prefetch(store, folder, ranks=ranks, options=OPTIONS)
        assert (report.packs, report.left_bytes) == (3, 0)
        assert report.fetched_bytes == sum(info.n_bytes for info in store.list(keys.DATA))


# -- hostile indexes ---------------------------------------------------------------------------------------------------


def _vote(store: Store, change: Callable[[Reader], None]) -> Commit:
    """Step 9: the index of step 3, changed, under valid digests."""
    parent = commit_of(store, 3)
    reader = open_vote(store, parent.vote(0))
    reader.records = reader.records.copy()
    change(reader)
    save = SaveId(1, 9, 0)
    place_vote(store, save, reader, parent=parent_to_json(Parent(parent.checkpoint, parent.digest)))
    commit = try_commit(store, save)
    assert commit is not None
    return commit


def _rename(old: str, new: str) -> Callable[[Reader], None]:
    def change(reader: Reader) -> None:
        reader.files = tuple(file._replace(key=new) if file.key == old else file for file in reader.files)

    return change


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PACK_OF.format(1), "data/000009-000000000001-000/r00000/000000.pack"),
        (PACK_OF.format(1), "data/000001-000000000010-000/r00000/000000.pack"),
        (PACK_OF.format(1), "data/000001-000000000009-001/r00000/000000.pack"),
    ],
    ids=["a later epoch", "a later step", "another try"],
)
def test_packs_that_a_save_cannot_know_are_named_by_check_and_not_copied(old: str, new: str) -> None:
    store, target = MemoryStore(), MemoryStore()
    chain(store, 3)
    store.put(new, store.get(old))  # all bytes are right
    _vote(store, _rename(old, new))
    report = checked(store)
    assert states_of(report)[9] == "damaged"
    assert new in str([str(finding) for finding in report.findings])
    copied = mirror(store, target, MirrorAsked(last=1), OPTIONS)
    assert [c.step for c, _ in copied.failed] == [9]
    assert new not in keys_of(target, "")
    assert same(read(store, commit_of(store, 9)), chain_state(3))  # every byte was verified, so it may be read


@pytest.mark.parametrize("key", ["../other/data/x.pack", "data/../commits/x", "/etc/passwd", "votes/x", "data//x"])
def test_keys_outside_of_data_are_refused_by_every_reader(key: str) -> None:
    store = MemoryStore()
    chain(store, 3)
    reader = open_vote(store, commit_of(store, 3).vote(0))
    _rename(PACK_OF.format(1), key)(reader)
    save = SaveId(1, 9, 0)
    place_vote(store, save, reader, parent=None)
    with pytest.raises(CorruptCheckpointError, match="file table"):
        try_commit(store, save)
    assert commit_key(save.checkpoint) not in keys_of(store, keys.COMMITS)


def test_what_is_made_from_a_chunk_of_a_newer_version_is_told_and_not_read() -> None:
    store, target = MemoryStore(), MemoryStore()
    chain(store, 3)

    def newer(reader: Reader) -> None:
        row = int(np.flatnonzero(reader.records["transform"] == Transform.SUBPACK)[0])
        reader.records["transform"][records.base_of(reader.records[row])[0]] = 10

    commit = _vote(store, newer)
    report = checked(store)
    assert states_of(report)[9] == "unsupported"
    assert "newer fastckpt" in report.not_checked[0]
    with pytest.raises(UnsupportedFormatError):
        read(store, commit)
    with pytest.raises(UnsupportedFormatError):
        compact_to(store, target, options=OPTIONS)
    salvaged = bad_chunks(open_vote(store, commit.vote(0)), range(len(open_vote(store, commit.vote(0)).records)), 1)
    assert len(salvaged) >= 2


ACTS: dict[str, Callable[[Store, Store, Path], Any]] = {
    "compact": lambda store, target, folder: compact_to(store, target, step=9, options=OPTIONS),
    "prefetch": lambda store, target, folder: prefetch(store, str(folder), step=9, options=OPTIONS),
}


@pytest.mark.parametrize("act", sorted(ACTS))
@pytest.mark.parametrize("hurt", ["missing", "short", "other bytes"])
def test_packs_that_are_not_what_the_file_table_says(act: str, hurt: str, tmp_path: Path) -> None:
    store, target = MemoryStore(), MemoryStore()
    chain(store, 3)
    _vote(store, lambda reader: None)
    key = PACK_OF.format(1)
    if hurt == "missing":
        store.delete(key)
    elif hurt == "short":
        store.put(key, store.get(key)[:-1000])
    else:
        store.put(key, bytes(len(store.get(key))))
    with pytest.raises(CheckpointError, match=key):
        ACTS[act](store, target, tmp_path / "cache")
    assert not keys_of(target, keys.COMMITS)
