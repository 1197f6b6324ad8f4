"""Writes the ranks of a checkpoint again, as a save of their own, and compares what was written with what was read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from itertools import zip_longest

from fastckpt._types import Progress
from fastckpt.errors import CorruptCheckpointError, Damage, SaveError
from fastckpt.format.keys import SaveId, parse_pack
from fastckpt.format.repository_records import Commit, Parent
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.commit import list_votes, open_vote
from fastckpt.store.base import Store
from fastckpt.upkeep.compact.stored_state import stored_state
from fastckpt.upkeep.mirror.plan import COMPACT
from fastckpt.writing.rank import SaveAsked, SaveRequest, upload
from fastckpt.writing.uplink import Uplink

ADVICE = "Take another step (`fastckpt ls` lists them), or get out what can be read with `fastckpt salvage`"


def is_full(reader: Reader, save: SaveId) -> bool:
    """Whether a vote needs no pack of another save."""
    return all(parse_pack(file.key) == save for file in reader.files)


def needs_others(store: Store, commit: Commit) -> bool:
    """Whether a checkpoint needs packs of other saves. UnreadableError, StoreError."""
    return not all(is_full(open_vote(store, commit.vote(rank)), commit.save) for rank in range(commit.world))


def write_again(
    source: Store,
    commit: Commit,
    target: Store,
    save: SaveId,
    parent: Parent | None,
    options: Options,
    progress: Progress,
) -> None:
    """Write all packs and votes of a checkpoint once more, under the name of another save, and verify the votes. Commits nothing.

    One rank after the other. CorruptCheckpointError: the source is damaged; UnsupportedFormatError, StoreError. SaveError: what was
    written is not what was read.
    """
    done = _counted(progress, max(commit.raw_bytes, 1))
    uplink = Uplink(options)
    for rank in range(commit.world):
        old = open_vote(source, commit.vote(rank))
        old.require_readable()
        asked = SaveAsked(save.step, trigger=COMPACT, metrics=commit.metrics, meta=old.directory.meta)
        request = SaveRequest(asked=asked, save=save, parent=parent, rank=rank, world=commit.world)
        state = stored_state(old, options, ADVICE, done)
        with contextlib.closing(state.source):
            upload(state, target, request, options, uplink=uplink)
        _require_same(old, _written(target, save, rank), save)


def _counted(progress: Progress, total: int) -> Callable[[int], None]:
    """A function for bytes that are done with. Any thread. The end is for the caller to tell."""
    lock, done = threading.Lock(), 0

    def add(n_bytes: int) -> None:
        nonlocal done
        with lock:
            done += n_bytes
            progress(min(done, total - 1), total)

    return add


def _written(store: Store, save: SaveId, rank: int) -> Reader:
    """The vote that was just placed."""
    for name in list_votes(store, save):
        if name.rank == rank:
            return open_vote(store, name)
    raise SaveError(
        f"{store.url}: the vote of rank {rank} was placed and is gone: somebody deletes what is written. Nothing is committed"
    )


def _require_same(old: Reader, new: Reader, save: SaveId) -> None:
    """SaveError unless the new index says of every byte the same as the old one, and needs only its own packs."""
    damage = []
    parts: tuple[tuple[str, object, object], ...] = (
        ("skeleton", old.skeleton, new.skeleton),
        ("tensors", old.directory.tensors, new.directory.tensors),
        ("storages", _forms(old), _forms(new)),
    )
    for what, before, now in parts:
        if before != now:
            damage.append(Damage("vote", what, "as in the checkpoint that was read", "a difference"))
    for number in range(len(old.directory.storages) if not damage else 0):
        for was, found in zip_longest(_digests(old, number), _digests(new, number)):
            if was is None or found is None or was[:2] != found[:2]:
                break  # cut at other places: there is nothing to compare, and the encoder has digested verified bytes
            if was != found:
                damage.append(Damage("vote", f"storage {number}, byte {was[0]}", was[2].hex(), found[2].hex()))
    if not is_full(new, save):
        damage.append(Damage("vote", "file table", "packs of this save alone", "others"))
    if damage:
        cause = CorruptCheckpointError(new.source.name, damage)
        raise SaveError(
            f"step {save.step} was not written again: what was written differs from what was read. Nothing is committed. Run it once "
            "more; if it fails again, a memory of this machine may be faulty"
        ) from cause


def _forms(reader: Reader) -> list[tuple[object, ...]]:
    return [(s.dtype, s.n_bytes, s.location, s.extents is None, s.shares, s.print) for s in reader.directory.storages]


def _digests(reader: Reader, storage: int) -> Iterator[tuple[int, int, bytes]]:
    """Position, length of the chunk and its digest, of each piece of a storage."""
    for piece in reader.pieces(storage):
        record = reader.records[piece.chunk]
        yield piece.position - piece.offset, int(record["raw_bytes"]), record["digest"].tobytes()


__all__ = ["is_full", "needs_others", "write_again"]
