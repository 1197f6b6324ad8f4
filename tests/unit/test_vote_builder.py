"""A vote is checked before it is placed, without reading it back: a builder that is wrong is found, one that is right is not disturbed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastckpt.errors import SaveError
from fastckpt.format import directory, directory_columns, directory_reader
from fastckpt.format.directory import Directory, Extent, FileEntry, GlobalPlace, Share, StorageEntry, TensorEntry
from fastckpt.format.keys import CheckpointId, SaveId, commit_key
from fastckpt.format.tensor_names import ReprKey
from fastckpt.format.vote import Vote
from fastckpt.repository.commit import list_votes, read_vote, try_commit
from fastckpt.store.memory import MemoryStore
from fastckpt.writing import rank, vote_builder
from fastckpt.writing.packing import PackingWriter
from fastckpt.writing.packs import PackWriter
from tests.support.repositories import begin, check_all, keys_of, vote
from tests.support.states import rich_state

SAVE = SaveId(1, 7, 0)


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    begin(store, 1)
    return store


def test_it_is_what_a_reader_finds(store: MemoryStore) -> None:
    built = vote(store, 1, 7, 0, 1, rich_state(3))
    (name,) = list_votes(store, SAVE)
    found = read_vote(store, name)
    assert replace(built.directory, tensors=()) == replace(found.directory, tensors=())
    assert sorted(map(repr, built.directory.tensors)) == sorted(map(repr, found.directory.tensors))
    assert (built.name, built.info, built.parts, built.files) == (found.name, found.info, found.parts, found.files)


def test_who_has_placed_it_commits_what_others_would(store: MemoryStore) -> None:
    built = vote(store, 1, 7, 0, 1, rich_state(3))
    assert try_commit(store, SAVE, built) is not None
    record = store.get(commit_key(CheckpointId(1, 7)))
    store.delete(commit_key(CheckpointId(1, 7)))
    assert try_commit(store, SAVE) is not None
    assert store.get(commit_key(CheckpointId(1, 7))) == record
    check_all(store)


def change_directory(change: Callable[[Directory], Directory]) -> Callable[[pytest.MonkeyPatch], None]:
    def switch(patch: pytest.MonkeyPatch) -> None:
        right = vote_builder.build_vote

        def wrong(save: SaveId, listed: Directory, *rest: Any) -> tuple[Vote, bytes]:
            return right(save, change(listed), *rest)

        patch.setattr(rank, "build_vote", wrong)

    return switch


def change_storage(number: int, **changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def change(listed: Directory) -> Directory:
        storages = list(listed.storages)
        storages[number] = storages[number]._replace(**changes)
        return replace(listed, storages=tuple(storages))

    return change_directory(change)


def change_tensor(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return change_directory(lambda d: replace(d, tensors=(d.tensors[0]._replace(**changes), *d.tensors[1:])))


def change_record(field: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def switch(patch: pytest.MonkeyPatch) -> None:
        right = PackingWriter.run

        def run(writer: PackingWriter) -> None:
            right(writer)
            writer.records[field][-1] = value

        patch.setattr(PackingWriter, "run", run)

    return switch


def change_files(change: Callable[[FileEntry], FileEntry]) -> Callable[[pytest.MonkeyPatch], None]:
    def switch(patch: pytest.MonkeyPatch) -> None:
        right = PackWriter.finish
        patch.setattr(PackWriter, "finish", lambda packs: [change(file) for file in right(packs)])

    return switch


def change_text(old: str, new: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Of every row."""

    def switch(patch: pytest.MonkeyPatch) -> None:
        right = directory.build
        patch.setattr(directory, "build", lambda value: right(value).decode().replace(old, new).encode())

    return switch


def share(*shares: tuple[Any, ...], print: Any = "") -> Callable[[pytest.MonkeyPatch], None]:
    """Of the first storage, which has 400 bytes; this is rank 0 of 1."""
    return change_storage(0, shares=tuple(Share(*one) for one in shares), print=print)


SWITCHES = {
    "shares of more bytes": share((0, 404)),
    "shares that do not reach the end": share((0, 40)),
    "a share of a rank that is not there": share((1, 400)),
    "a share of another element": share((0, 400.0)),
    "a print that is none": share((0, 400), print="abc"),
    "a print of nothing": share(print="0" * 32),
    "an extent of no record": change_storage(-1, extents=(Extent(10**6, 0, 4),)),
    "extents shorter than the storage": change_storage(0, extents=(Extent(0, 0, 4),)),
    "no extents": change_storage(0, extents=()),
    "a storage without data": change_storage(0, extents=None),
    "an unknown element type": change_storage(0, dtype="float65"),
    "a length that is no integer": change_storage(0, n_bytes=4.0),
    "a tensor beyond its storage": change_tensor(offset=1 << 30),
    "a tensor of no storage": change_tensor(storage=10**6),
    "strides for another shape": change_tensor(shape=(1, 2, 3), stride=(1,)),
    "a negative stride": change_tensor(shape=(2,), stride=(-1,)),
    "an unknown kind": change_tensor(kind="new"),
    "no kind": change_tensor(kind=None),
    "a flag that is none": change_tensor(requires_grad=1),
    "a name that is no name": change_tensor(name=(1.5,)),
    "a record of no transform": change_record("transform", 0),
    "a record beyond its pack": change_record("offset", 1 << 40),
    "a record of no file": change_record("file", 1000),
    "a key that is no pack's": change_files(lambda file: file._replace(key="../other")),
    "a shorter pack": change_files(lambda file: file._replace(n_bytes=1)),
    "rows that are no JSON": change_text('"offset":', '"offset"'),
    "rows of another storage": change_text('"storage":0', '"storage":1'),
    "rows without a member": change_text('"kind":"tensor",', ""),
}  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_a_builder_that_is_wrong_places_no_vote(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, switch: Callable[[pytest.MonkeyPatch], None]
) -> None:
    switch(monkeypatch)
    with pytest.raises(SaveError, match="step 7 was not saved, because nobody could read its index"):
        vote(store, 1, 7, 0, 1, rich_state(3, 100))
    assert keys_of(store, "votes/") == []


def changed(rng: random.Random, value: Any) -> Any:
    """Another value of the same place, right or wrong."""
    if isinstance(value, tuple):
        items = list(value)
        if items and rng.random() < 0.8:
            at = rng.randrange(len(items))
            items[at] = changed(rng, items[at])
        elif rng.random() < 0.5:
            items.append(rng.choice([0, 1, "x"]))
        kind = type(value)
        return kind._make(items) if kind in (Extent, Share) and len(items) == len(kind._fields) else tuple(items)
    if type(value) is int:
        return rng.choice([value + 1, value - 1, 0, -1, 1 << 39, 1 << 41, 1 << 62, 1 << 63, True, float(value), None])
    return rng.choice(
        [
            None,
            "float16",
            "float65",
            "meta",
            "cpu",
            "tensor",
            "quantized",
            True,
            7,
            GlobalPlace((4,), (-1,)),
            (),
            ReprKey("x"),
        ]
    )


def directories() -> Iterator[Directory]:
    storages = (
        StorageEntry("float32", 640, "cpu", (Extent(0, 0, 640),)),
        StorageEntry("float32", 64, "cuda:0", (Extent(1, 0, 32), Extent(2, 8, 32))),
        StorageEntry("bool", 9, "meta", None),
        StorageEntry("bool", 0, "cpu", ()),
        StorageEntry(
            "float32", 128, "cpu", (Extent(2, 100, 64),), (Share(1, 64), Share(2, 60), Share(3, 4)), "0f" * 16
        ),
        StorageEntry("float32", 12, "cpu", (), (Share(0, 12),)),
    )
    tensors = (
        TensorEntry(("a", 1, "b"), "float32", (4, 10), (10, 1), 100, 0, "tensor", False),
        TensorEntry((ReprKey("<X>"),), "float32", (16,), (1,), 0, 1, "parameter", True, GlobalPlace((32,), (16,))),
        TensorEntry((), "bool", (0, 3), (3, 1), 0, 3, "array", False),
        TensorEntry(("c",), "float32", (32,), (1,), 0, 4, "tensor", False),
        TensorEntry(("d",), "float32", (3,), (1,), 0, 5, "tensor", False),
    )
    yield Directory(storages, tensors, rank=1, world=4)
    for seed in range(3000):
        rng = random.Random(seed)
        rows: list[list[Any]] = [list(storages), list(tensors)]
        kind = rng.randrange(2)
        at = rng.randrange(len(rows[kind]))
        members = list(rows[kind][at])
        place = rng.randrange(len(members))
        members[place] = changed(rng, members[place])
        rows[kind][at] = (StorageEntry, TensorEntry)[kind]._make(members)
        yield Directory(tuple(rows[0]), tuple(rows[1]), rank=1, world=rng.choice([4, 4, 4, 3]))


def test_what_is_held_for_sound_is_read() -> None:
    raw_bytes = np.full(3, 640, np.uint32)
    n_sound = 0
    for value in directories():
        if directory_columns.sound(value, raw_bytes):
            n_sound += 1
            found = directory_reader.parse(directory.build(value), raw_bytes, "here")
            assert found.storages == value.storages, value
    assert n_sound > 100
