"""Votes of many ranks that hold rows of the same tensors, without any data behind them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fastckpt.format import records
from fastckpt.format.directory import Directory, Extent, FileEntry, GlobalPlace, StorageEntry, TensorEntry
from fastckpt.format.keys import SaveId, commit_key, pack_key, vote_key
from fastckpt.format.repository_records import commit_bytes, utc_now
from fastckpt.format.vote import SaveInfo, Vote, commit_of, save_to_json
from fastckpt.kernels.transform import Transform
from fastckpt.store.local import LocalStore
from fastckpt.writing.vote_builder import build_vote

SAVE = SaveId(1, 1, 0)
CHUNK_BYTES = 4 << 20
COLUMNS = 1024


def write_votes(folder: Path, ranks: int, n_tensors: int, n_records: int) -> int:
    """Their bytes. Each rank has as many rows of each tensor as make its share of the records."""
    store = LocalStore(str(folder))
    votes: list[Vote] = []
    for rank in range(ranks):
        vote, data = _vote(rank, ranks, n_tensors, n_records // n_tensors)
        store.put(vote_key(vote.name), data)
        votes.append(replace(vote, directory=replace(vote.directory, storages=(), tensors=())))
    store.put(commit_key(SAVE.checkpoint), commit_bytes(commit_of(votes, "benchmark")))
    return sum(vote.name.n_bytes for vote in votes)


def _vote(rank: int, ranks: int, n_tensors: int, n_each: int) -> tuple[Vote, bytes]:
    n_bytes = n_each * CHUNK_BYTES
    rows = n_bytes // 4 // COLUMNS
    place = GlobalPlace((ranks * rows, COLUMNS), (rank * rows, 0))
    storages = tuple(
        StorageEntry("float32", n_bytes, "cpu", (Extent(n * n_each, 0, n_bytes),)) for n in range(n_tensors)
    )
    names = [("model", f"layers.{n // 8}.attention.w{n % 8}.weight") for n in range(n_tensors)]
    shape, stride = (rows, COLUMNS), (COLUMNS, 1)
    tensors = tuple(
        TensorEntry(name, "float32", shape, stride, 0, n, "parameter", True, place) for n, name in enumerate(names)
    )
    chunks = np.zeros(n_tensors * n_each, records.LAYOUT)
    chunks["transform"], chunks["lane_bytes"], chunks["file"] = int(Transform.RAW), 1, 1
    chunks["stored_bytes"] = chunks["raw_bytes"] = CHUNK_BYTES
    chunks["offset"] = np.arange(len(chunks), dtype=np.uint64) * CHUNK_BYTES
    chunks["digest"] = np.random.default_rng(rank).bytes(16)
    file = FileEntry(pack_key(SAVE, rank, 0), len(chunks) * CHUNK_BYTES, 0)
    info = SaveInfo(SAVE, None, "manual", {}, file.n_bytes, file.n_bytes, 1.0, utc_now())
    listed = Directory(storages, tensors, SAVE.step, rank, ranks, {"fastckpt": "benchmark"}, {}, save_to_json(info))
    return build_vote(SAVE, listed, [file], chunks, b"\x80\x02}q\x00.")
