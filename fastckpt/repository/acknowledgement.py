"""What a save looks at after its commit record was seen: four requests that need not wait for each other."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

from fastckpt.format.keys import MARKER, epoch_key
from fastckpt.format.repository_records import Commit, Epoch, Tombstone, epoch_bytes
from fastckpt.host.threads import WorkerPool
from fastckpt.repository.commit import poll_commit
from fastckpt.repository.repository import Repository, is_there


class Found(NamedTuple):
    """See `look`."""

    commit: Commit | Tombstone | None
    """What stands at the commit key."""
    newest: int
    """The highest epoch."""
    epoch: bool | None
    """Whether our epoch's record has our bytes; None: there is none."""
    marker: bool | None
    """The same of the marker."""


def look(repository: Repository, commit: Commit, epoch: Epoch, *, at_once: bool) -> Found:
    """Look at everything that an acknowledgement depends on. Only reads. The record of `commit` was seen before: whatever is read here is
    later than it, and nothing depends on the order of the four.

    at_once: by threads, so that all take one round trip; otherwise one after the other. UnreadableError, StoreError: the first of these.
    """
    with contextlib.closing(WorkerPool(4 if at_once else 0, "fastckpt-acknowledge")) as pool:
        store = repository.store
        looks = (
            pool.submit(functools.partial(poll_commit, store, commit.checkpoint)),
            pool.submit(repository.newest_epoch),
            pool.submit(functools.partial(is_there, store, epoch_key(epoch.number), epoch_bytes(epoch))),
            pool.submit(functools.partial(_has_marker, repository)),
        )
        record, newest, ours, marker = looks
        return Found(record.result(), newest.result(), ours.result(), marker.result())


def _has_marker(repository: Repository) -> bool | None:
    mine = repository.marker_bytes
    return mine is None or is_there(repository.store, MARKER, mine)
