"""How many bytes of earlier saves a checkpoint needs: from two ranges of each vote, for people."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np

from fastckpt.errors import UnreadableError
from fastckpt.format import records
from fastckpt.format.container import MAX_PART_BYTES
from fastckpt.format.directory import parse_file_table
from fastckpt.format.keys import CheckpointId, parse_pack, vote_key
from fastckpt.format.repository_records import Commit
from fastckpt.repository.file_tables import read_range
from fastckpt.store.base import Store
from fastckpt.upkeep.mirror.transfer import in_parallel

_MOST_VOTES = 256
"""Of older checkpoints nothing is told: a list should not take minutes."""
_CONNECTIONS = 16


def references(store: Store, commits: Iterable[Commit]) -> dict[CheckpointId, int]:
    """Stored bytes that checkpoints need from packs of earlier saves; 0: a checkpoint is full. StoreError.

    commits: the most wanted first. What cannot be read is left out, and what comes after some hundred votes. The ranges have no checksum of
    their own, so this is nothing to decide by.
    """
    wanted: list[Commit] = []
    left = _MOST_VOTES
    for commit in commits:
        left -= commit.world
        if left < 0:
            break
        wanted.append(commit)
    calls = [functools.partial(_of_rank, store, commit, rank) for commit in wanted for rank in range(commit.world)]
    found = in_parallel(calls, min(_CONNECTIONS, max(len(calls), 1)), "fastckpt-references")
    of_commit = {commit.checkpoint: [next(found) for _ in range(commit.world)] for commit in wanted}
    return {checkpoint: sum(n for n in ns if n is not None) for checkpoint, ns in of_commit.items() if None not in ns}


def _of_rank(store: Store, commit: Commit, rank: int) -> int | None:
    try:
        source = f"{store.url}/{vote_key(commit.vote(rank))}"
        files = parse_file_table(_part(store, commit, rank, "file table"), False, source)
        earlier = np.array([False, *(parse_pack(file.key) != commit.save for file in files)])
        if not earlier.any():
            return 0
        rows = records.unpack(_part(store, commit, rank, "records"))
        if (rows["file"] > len(files)).any():
            return None
        rows = np.unique(rows[earlier[rows["file"]]][["file", "offset", "stored_bytes"]])
        return int(rows["stored_bytes"].sum(dtype=np.int64))
    except (UnreadableError, ValueError):  # what is wrong with it, `check` says
        return None


def _part(store: Store, commit: Commit, rank: int, name: str) -> bytes:
    offset, n_bytes = commit.votes[rank].parts[name]
    if offset + n_bytes > commit.votes[rank].n_bytes or n_bytes > MAX_PART_BYTES[name]:
        raise ValueError(name)
    return read_range(store, commit, rank, offset, n_bytes)


__all__ = ["references"]
