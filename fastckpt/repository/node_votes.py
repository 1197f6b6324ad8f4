"""Votes that all ranks of a node need are read once: by the node's first rank, which leaves them in shared memory for the others.

An owner's vote may have 10 MB, there may be 32 of them, and a node has 8 ranks that want the same ones. What lies there is believed no more
than what a store gives: whoever reads a vote compares its digest with its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from fastckpt.format.keys import VOTES, parse_vote
from fastckpt.ranks.world import World
from fastckpt.repository.cached_store import CachedStore
from fastckpt.store.base import ObjectInfo, Store
from fastckpt.store.wrap import T, Wrapper

_PATIENCE_S = 20.0
"""How long a vote is waited for that the first rank may be reading; then the rank reads it for itself."""
_DONE = "done"


@contextlib.contextmanager
def shared_votes(store: Store, world: World, nonce: str, own: str) -> Iterator[Store]:
    """The store, for one restore of one rank. nonce: the same on all ranks, and another one for each restore. own: the key of this
    rank's own vote, which nobody else needs.
    """
    if world.local_size == 1:
        yield store
        return
    vote = parse_vote(own)
    if isinstance(store, CachedStore) and vote is not None:
        store.share_with_node(vote.save)
    shared = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    folder = shared / f"fastckpt-{os.getuid()}-{nonce}-{world.rank - world.local_rank}"
    votes = _NodeVotes(store, folder, own, leads=world.leads_node)
    try:
        yield votes
    finally:
        votes.finish()


def remove_shared_votes(world: World, nonce: str) -> None:
    """After all ranks have read what they need. By the node's first rank."""
    if world.leads_node:
        for shared in ("/dev/shm", tempfile.gettempdir()):
            shutil.rmtree(f"{shared}/fastckpt-{os.getuid()}-{nonce}-{world.rank}", ignore_errors=True)


class _NodeVotes(Wrapper):
    """Several threads may read at once."""

    def __init__(self, inner: Store, folder: Path, own: str, *, leads: bool) -> None:
        super().__init__(inner)
        self._folder, self._own, self._leads = folder, own, leads
        if leads:
            try:
                folder.mkdir(mode=0o700)
            except OSError:  # no room, no right: each rank reads for itself
                self._leads = False

    def finish(self) -> None:
        """The first rank has read all that it needs: nobody waits for more."""
        if self._leads:
            with contextlib.suppress(OSError):
                (self._folder / _DONE).touch()

    def _call(self, verb: str, key: str, operation: Callable[[], T]) -> T:
        if not key.startswith(VOTES) or verb not in ("head", "get"):
            return operation()
        path = self._folder / hashlib.sha256(key.encode()).hexdigest()
        if self._leads:
            found = operation()
            if verb == "get":
                self._leave(path, cast(bytes, found))
            return found
        if key == self._own or not self._is_there(path):
            return operation()
        try:
            info = path.stat()
            found_here: Any = ObjectInfo(key, info.st_size, info.st_mtime) if verb == "head" else path.read_bytes()
        except OSError:
            return operation()
        return cast(T, found_here)

    def _leave(self, path: Path, data: bytes) -> None:
        with contextlib.suppress(OSError):  # it is full: the others read for themselves
            part = path.with_suffix(".part")
            part.write_bytes(data)
            part.rename(path)

    def _is_there(self, path: Path) -> bool:
        """Wait for a vote, as long as the first rank may be reading it. Its folder is made before it reads anything."""
        end_s = time.monotonic() + _PATIENCE_S
        while not path.exists():
            if (self._folder / _DONE).exists() or time.monotonic() > end_s or not self._folder.exists():
                return path.exists()
            time.sleep(0.01)
        return True
