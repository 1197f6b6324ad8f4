"""Repositories whose saves name chunks of earlier ones, made by hand: rows that are copied, differences, bases that are carried, casts."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastckpt import codec
from fastckpt.format import keys, records
from fastckpt.format.digest import crc64nvme
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import SaveId, pack_key, vote_key
from fastckpt.format.repository_records import Commit, Parent, marker_bytes, utc_now, writer
from fastckpt.format.sealed_state import SealedState
from fastckpt.format.tensor_names import dotted
from fastckpt.format.vote import SaveInfo, save_to_json
from fastckpt.kernels.transform import HAS_BASE, MAX_RAW_BYTES, Transform
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.commit import open_vote, try_commit
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.store.memory import MemoryStore
from fastckpt.upkeep.compact.stored_state import stored_state
from fastckpt.writing.chunk_writer import ChunkWriter
from fastckpt.writing.vote_builder import build_vote
from tests.support.repositories import begin, keys_of, save_ranks
from tests.support.states import sealed

_EFFORT = codec.Effort.NORMAL


def save_on(
    store: Store,
    parent: Commit,
    step: int,
    states: Sequence[Any],
    *,
    epoch: int | None = None,
    casts: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Commit:
    """A save of all ranks against a checkpoint. states: objects, or sealed states, of the form that the parent has. casts: dotted name of a
    bfloat16 tensor → that of its float32 master.
    """
    save = SaveId(epoch or parent.save.epoch, step, 0)
    for rank, obj in enumerate(states):
        one = obj if isinstance(obj, SealedState) else sealed(obj)
        _Vote(store, save, rank, len(states), open_vote(store, parent.vote(rank)), one).place(
            parent, casts or {}, metrics or {}
        )
    commit = try_commit(store, save)
    assert commit is not None
    return commit


def save_again(store: Store, step: int, like: Commit, parent: Commit, casts: Mapping[str, str] | None = None) -> Commit:
    """A save against a checkpoint, of the state that another checkpoint has."""
    options = Options(threads=1, connections=1)
    states = [stored_state(open_vote(store, like.vote(rank)), options) for rank in range(like.world)]
    try:
        return save_on(store, parent, step, states, casts=casts)
    finally:
        for one in states:
            one.source.close()


def chain_state(step: int) -> dict[str, Any]:
    """Frozen, slowly changing and new tensors, a bfloat16 copy of a master: each is a chunk of its own."""
    base = torch.randn(3_000, generator=torch.Generator().manual_seed(1))
    master = base + step * 1e-4 * torch.randn(3_000, generator=torch.Generator().manual_seed(step))
    return {
        "a_master": master,
        "b_copy": master.bfloat16(),
        "frozen": base.double(),
        "slow": (base + step * 1e-3).half(),
        "ids": torch.arange(step, step + 5),
        "step": {"number": step},
    }


def chain(store: Store, steps: int = 3, world: int = 1) -> Commit:
    """Steps 1 … n of epoch 1, each against the one before it. Each rank has a state of its own. The same objects each time."""
    template, commit = _chain(steps, world)
    for key in keys_of(template, ""):
        store.put(key, template.get(key))
    marker = Repository(store).marker()
    assert marker is not None
    store.put(keys.MARKER, marker_bytes(replace(marker, repository=secrets.token_hex(16))))
    return commit


@functools.cache
def _chain(steps: int, world: int) -> tuple[Store, Commit]:
    store = MemoryStore()
    begin(store, world)
    commit = save_ranks(store, 1, 1, [chain_state(1 + 100 * rank) for rank in range(world)])
    for step in range(2, steps + 1):
        states = [chain_state(step + 100 * rank) for rank in range(world)]
        commit = save_on(store, commit, step, states, casts={"b_copy": "a_master"}, metrics={"loss": 1 / step})
    return store, commit


class _Vote:
    """One rank's part: rows of the index and the pack that they make."""

    def __init__(self, store: Store, save: SaveId, rank: int, world: int, old: Reader, new: SealedState) -> None:
        self._store, self._save, self._rank, self._world = store, save, rank, world
        self._old, self._new = old, new
        self._row_of_chunk = dict(_pairs(new, old))
        assert len(set(self._row_of_chunk.values())) == len(new.chunks), "the form has changed"
        self._carried: set[int] = set()
        self._pack = bytearray()

    def place(self, parent: Commit, casts: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        new = self._new
        raws = [new.source.raw(n, np.empty(MAX_RAW_BYTES, np.uint8)).copy() for n in range(len(new.chunks))]
        masters = {self._chunk_of(copy): self._chunk_of(master) for copy, master in casts.items()}
        rows, bases = [], []
        for number, raw in enumerate(raws):
            row, base = self._row(number, raw, masters.get(number))
            rows.append(row)
            bases.append(base)
        carried = sorted(self._carried)
        at = {old: i for i, old in enumerate(carried)}
        table = np.concatenate([self._old.records[carried].copy(), np.array(rows, records.LAYOUT)])
        for i, old in enumerate(carried):
            _move(table, i, at, self._old.records[old])
        for i, (row, base) in enumerate(zip(rows, bases, strict=True), len(carried)):
            if base == "old":  # copied as it was
                _move(table, i, at, row)
            elif isinstance(base, tuple):  # ("chunk", n): of this save; ("row", n): of the parent
                where = len(carried) + base[1] if base[0] == "chunk" else at[base[1]]
                table["parameter"][i] = np.void(where.to_bytes(4, "little") + bytes(4))
        self._put(parent, metrics, table, own=len(carried))

    def _chunk_of(self, name: str) -> int:
        storage = next(entry.storage for entry in self._new.tensors if dotted(entry.name) == name)
        (extent,) = self._new.storages[storage].extents or ()
        return extent.record

    def _row(self, number: int, raw: Any, master: int | None) -> tuple[Any, Any]:
        chunk, old = self._new.chunks[number], self._row_of_chunk[number]
        before = np.empty(int(self._old.records["raw_bytes"][old]), np.uint8)
        assert self._old.read_chunk(old, before) is None
        if np.array_equal(before, raw):
            self._carry_bases(old)
            row = self._old.records[old].copy()
            row["file"] += 1 if row["file"] else 0
            return row, "old" if row["transform"] in HAS_BASE else None
        element = chunk.element
        found = codec.encode(raw, element.const_lane_bytes, element.float_lane_bytes, base=before, effort=_EFFORT)
        if master is not None:
            found = replace(found, transform=Transform.CAST, lane_bytes=2, pack_bits=0, stored=b"", crc64nvme=0)
        rows = bytearray(records.RECORD_BYTES)
        stored = bytes(memoryview(found.stored).cast("B")) if len(found.stored) else b""
        records.fill(
            rows,
            0,
            found.transform,
            found.lane_bytes,
            found.pack_bits,
            1 if stored else 0,
            len(self._pack) if stored else 0,
            len(stored),
            raw.size,
            found.digest,
            found.crc64nvme,
            found.parameter,
        )
        self._pack += stored
        row = np.frombuffer(rows, records.LAYOUT)[0].copy()
        if master is not None:
            return row, ("chunk", master)
        if found.transform not in HAS_BASE:
            return row, None
        self._carried.add(old)
        self._carry_bases(old)
        return row, ("row", old)

    def _carry_bases(self, row: int) -> None:
        record = self._old.records[row]
        if int(record["transform"]) in HAS_BASE:
            first, start, n_bytes = records.base_of(record)
            spans = start + n_bytes > int(self._old.records["raw_bytes"][first])
            for base in (first, first + 1) if spans else (first,):
                self._carried.add(base)
                self._carry_bases(base)

    def _put(self, parent: Commit, metrics: Mapping[str, float], table: Any, own: int) -> None:
        new, files = self._new, [FileEntry("", 0, 0), *self._old.files]
        if own:  # carried rows are still numbered as in the parent's file table
            table["file"][:own] += (table["file"][:own] > 0).astype(np.uint32)
        if self._pack:
            key = pack_key(self._save, self._rank, 0)
            self._store.put(key, bytes(self._pack))
            files[0] = FileEntry(key, len(self._pack), crc64nvme(bytes(self._pack)))
        named = [n for n in np.unique(table["file"]).tolist() if n]
        for i, number in enumerate(named, 1):
            table["file"][table["file"] == number] = i
        storages = tuple(
            s._replace(extents=tuple(e._replace(record=e.record + own) for e in s.extents))
            if s.extents is not None
            else s
            for s in new.storages
        )
        info = SaveInfo(
            self._save,
            Parent(parent.checkpoint, parent.digest),
            "manual",
            metrics,
            new.own_bytes,
            len(self._pack),
            0.5,
            utc_now(),
        )
        listed = replace(
            ChunkWriter(replace(new, storages=storages), "").directory(),
            step=self._save.step,
            rank=self._rank,
            world=self._world,
            save=save_to_json(info),
        )
        listed = replace(listed, writer={**listed.writer, **writer()})
        built, data = build_vote(self._save, listed, [files[n - 1] for n in named], table, new.skeleton)
        self._store.put(vote_key(built.name), data)


def _pairs(new: SealedState, old: Reader) -> Iterator[tuple[int, int]]:
    """Chunks of the state, and the rows that hold the same of the same storages."""
    for number, storage in enumerate(new.storages):
        rows = [piece.chunk for piece in old.pieces(number)]
        chunks: list[int] = []
        for chunk, offset, left in storage.extents or ():
            while left > 0:
                chunks.append(chunk)
                left, chunk, offset = left - (new.chunks[chunk].n_bytes - offset), chunk + 1, 0  # noqa: PLW2901
        yield from zip(chunks, rows, strict=True)


def _move(table: Any, row: int, at: Mapping[int, int], old: Any) -> None:
    """Let a copied row name its base where that is now."""
    if int(old["transform"]) in HAS_BASE:
        first = records.base_of(old)[0]
        rest = old["parameter"].tobytes()[4:]
        table["parameter"][row] = np.void(at[first].to_bytes(4, "little") + rest)


__all__ = ["chain", "chain_state", "save_again", "save_on"]
