"""Checks the votes of a checkpoint: each index completely, the lengths of its packs, and the commit record that follows from the votes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastckpt.errors import Damage
from fastckpt.format import keys, records
from fastckpt.format.repository_records import Commit, commit_bytes
from fastckpt.format.shares import Claims
from fastckpt.format.vote import Vote, commit_of, part_ranges, save_info
from fastckpt.kernels.transform import transform_name
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.commit import open_vote
from fastckpt.repository.rank_reader import lost_shares
from fastckpt.store.base import Store
from fastckpt.upkeep.check.report import ReportBuilder
from fastckpt.upkeep.mirror.named import misplaced


def check_votes(store: Store, commit: Commit, sizes: Mapping[str, int], found: ReportBuilder) -> set[str]:
    """Check all votes of a checkpoint. Returns the keys of the packs that they name, missing packs included.

    sizes: length in bytes of every existing object, by key.
    """
    checkpoint = commit.checkpoint
    named: set[str] = set()
    votes: list[Vote] = []
    claims, unreadable = Claims(), set[int]()
    short: list[tuple[int, Reader]] = []
    for rank in range(commit.world):
        name = commit.vote(rank)
        key = keys.vote_key(name)
        reader = found.read(key, functools.partial(open_vote, store, name), checkpoint, rank=rank, rank_lost=True)
        if reader is None:
            unreadable.add(rank)
            continue
        claims.add(rank, reader.directory)
        info = found.read(key, functools.partial(save_info, reader.directory, name, key), checkpoint, rank=rank)
        if info is not None:
            votes.append(Vote(name, info, reader.directory, part_ranges(reader.footer), reader.files))
        named.update(file.key for file in reader.files)
        later = [wrong for file in reader.files if (wrong := misplaced(file, commit)) is not None]
        found.add(key, later, checkpoint, rank=rank)
        if any(sizes.get(file.key) != file.n_bytes for file in reader.files):
            short.append((rank, reader))
        unread = records.unsupported(reader.records)
        if unread:
            used = ", ".join(sorted({transform_name(int(reader.records["transform"][n])) for n in unread}))
            words = f"{key}: {len(unread)} chunks use transforms of a newer fastckpt ({used})"
            found.add_unsupported(words, checkpoint)
    for rank, reader in short:
        _check_lengths(commit, rank, reader, sizes, claims, found)
    losses = found.read(keys.commit_key(checkpoint), lambda: lost_shares(store, commit, claims, unreadable)) or ()
    for lost in losses:
        key = keys.vote_key(commit.vote(lost.owner)) if lost.owner < commit.world else keys.commit_key(checkpoint)
        found.add(key, [lost.damage], checkpoint, rank=lost.owner, also_ranks=lost.needed_by)
    if len(votes) == commit.world and not losses:
        _compare(commit, votes, found)
    return named


def _check_lengths(
    commit: Commit, rank: int, reader: Reader, sizes: Mapping[str, int], claims: Claims, found: ReportBuilder
) -> None:
    """Compare the length of each pack with the file table of one rank."""
    for number, file in enumerate(reader.files, 1):
        n_bytes = sizes.get(file.key)
        if n_bytes != file.n_bytes:
            what = "no such object" if n_bytes is None else f"{n_bytes} bytes"
            # Which tensors are lost of a pack that is there is found chunk by chunk, unless the check is quick.
            named = n_bytes is None or found.report.quick
            lost = reader.tensors_of_file(number) if named else ()
            chunks = np.flatnonzero(reader.records["file"] == number).tolist() if named else []
            damage = Damage("pack", "length", f"{file.n_bytes} bytes", what, lost)
            also = also_ranks(rank, reader, chunks, claims)
            found.add(file.key, [damage], commit.checkpoint, rank=rank, also_ranks=also)


def also_ranks(rank: int, reader: Reader, chunks: Iterable[int], claims: Claims) -> tuple[int, ...]:
    """The other ranks that lose what one rank's chunks hold, as it writes them for all."""
    others = claims.others(rank, reader.directory)
    if not others:
        return ()
    storages = {storage for chunk in chunks for storage in reader.storages_of_chunk[chunk]}
    return tuple(sorted({other for storage in storages for other in others.get(storage, ())}))


def _compare(commit: Commit, votes: Sequence[Vote], found: ReportBuilder) -> None:
    """Compare the commit record with the one that follows from the votes. It follows from the votes alone, so any difference is damage."""
    key = keys.commit_key(commit.checkpoint)
    expected = found.read(key, lambda: commit_of(votes, key), commit.checkpoint)
    if expected is None or _without_digest(expected) == _without_digest(commit):
        return
    differ = [name for name in vars(commit) if name != "digest" and _differ(vars(commit)[name], vars(expected)[name])]
    found.add(key, [Damage("commit", ", ".join(differ) or "as a whole", "what the votes say", "something else")])


def _without_digest(commit: Commit) -> bytes:
    return commit_bytes(replace(commit, digest=""))


def _differ(a: Any, b: Any) -> bool:
    """Whether two values of a record differ. NaN counts as equal to NaN here."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() != b.keys() or any(_differ(a[key], b[key]) for key in a)
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return bool(a != b) and not both_nan
