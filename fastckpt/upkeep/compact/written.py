"""Writes the ranks of a checkpoint again, as a save of their own, and compares what was written with what was read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from fastckpt._types import Progress
from fastckpt.errors import SaveError
from fastckpt.format.keys import SaveId, parse_pack
from fastckpt.format.repository_records import Commit, Parent
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.commit import list_votes, open_vote
from fastckpt.store.base import Store
from fastckpt.upkeep.compact.comparing import require_same
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
        new = _written(target, save, rank)
        require_same(old, new, save)
        if not is_full(new, save):
            raise SaveError(
                f"{new.source.name} names packs of other saves: a fault of fastckpt, please report it. Nothing is committed"
            )


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


__all__ = ["is_full", "needs_others", "write_again"]
